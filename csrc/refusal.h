// How native code refuses: by std::runtime_error, with a message made without iostreams. Include it before
// any other header of torch.
//
// libtorch may bring a C++ runtime other than that of the compiler used here. Two of them disagree on the
// facets of a stream's locale: formatting a message with std::ostringstream then ends the process before
// anything is thrown. So the macros of torch's headers are replaced, for the inline functions of those
// headers too. setup.py sees to it that exceptions are thrown by the runtime that catches them.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace zsu {

template <class T>
std::string text_of(const T& part) {
  if constexpr (std::is_convertible_v<const T&, std::string>) return part;
  else if constexpr (std::is_enum_v<T>) return std::to_string(static_cast<long long>(part));
  else return std::to_string(part);
}

// Throws the parts, which are strings, numbers or enumerators, as one message.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::string text;
  ((text += text_of(parts)), ...);
  throw std::runtime_error(text);
}

// Why the last call of torch failed; null before torch 2.13, which only prints it.
inline const char* reason_of_torch() {
#if defined(_WIN32)
  return nullptr;
#else
  using Getter = const char* (*)();
  const auto get = reinterpret_cast<Getter>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return get ? get() : nullptr;
#endif
}

// Refuses because `call`, the text of a call of torch's C functions, has failed.
[[noreturn]] inline void refuse_call(const char* call) {
  const std::string name(call, std::strcspn(call, "("));
  if (const char* reason = reason_of_torch()) refuse(name, " failed: ", reason);
  // the arguments have been checked by now, so that memory is all that these can lack
  const bool allocates = std::strstr(call, "empty") || std::strstr(call, "dispatcher") || std::strstr(call, "aten");
  refuse(name, " failed", allocates ? ", most likely out of memory" : "", " (torch printed the reason to stderr)");
}

} // namespace zsu

// torch's own uses of them are not always followed by a semicolon
#undef STD_TORCH_CHECK
#define STD_TORCH_CHECK(condition, ...) \
  if (!(condition)) {                   \
    zsu::refuse(__VA_ARGS__);           \
  }

#undef TORCH_ERROR_CODE_CHECK
#undef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != TORCH_SUCCESS) {            \
    zsu::refuse_call(#call);                \
  }
#define TORCH_ERROR_CODE_CHECK STABLE_TORCH_ERROR_CODE_CHECK // its name up to torch 2.11
