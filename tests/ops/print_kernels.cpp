// Runs the CPU kernels on fixed inputs, without torch, and prints the instruction set and the results,
// one number a line after its type. tests/test_build.py compares those of two CPUs.
#include "kernels.h"

#include <cstdio>
#include <vector>

namespace {

// A linear congruential generator; uniform in [-1, 1).
double next_random() {
  static uint64_t state = 1;
  state = state * 6364136223846793005ULL + 1442695040888963407ULL;
  return static_cast<double>(state >> 11) / static_cast<double>(1ULL << 52) - 1;
}

const char* const names[] = {"float32", "float64", "bfloat16", "float16"};

// 16-bit patterns of normal numbers; both types hold 0.5 to 2 in these.
uint16_t random_bits(zsu::Storage type) {
  const auto mantissa = static_cast<uint16_t>((next_random() + 1) * 500);
  if (type == zsu::Storage::bfloat16) return static_cast<uint16_t>(0x3f00 + mantissa % 256);
  return static_cast<uint16_t>((next_random() < 0 ? 0x8000 : 0) + 0x3800 + mantissa);
}

double value_of(zsu::Storage type, uint16_t bits) {
  if (type == zsu::Storage::bfloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float v;
    __builtin_memcpy(&v, &wide, sizeof v);
    return v;
  }
  const double sign = bits & 0x8000 ? -1 : 1;
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  return sign * (exponent ? __builtin_ldexp(1024 + mantissa, exponent - 25) : __builtin_ldexp(mantissa, -24));
}

template <class T, class C>
void signed_loss(zsu::Storage type, int64_t classes) {
  constexpr int64_t rows = 3;
  std::vector<T> logits(static_cast<size_t>(rows * classes)), dlogits(logits.size());
  for (T& v : logits) {
    if constexpr (sizeof(T) == 2) v = random_bits(type);
    else v = static_cast<T>(12 * next_random());
  }
  const int64_t target[rows] = {0, classes / 2, classes - 1};
  const C coef[rows] = {C(-0.9), C(0.1), C(0.4)};
  double loss[rows] = {0, 0, 0};
  const auto index = static_cast<int>(type);
  const zsu::SignedCrossEntropyArgs args{logits.data(), classes, dlogits.data(), classes, classes, target, coef, loss};
  zsu::kernels().signed_cross_entropy[index](args, 0, rows);
  for (const double v : loss) std::printf("%s %.17g\n", names[index], v);
  for (const T v : dlogits) {
    if constexpr (sizeof(T) == 2) std::printf("%s %.17g\n", names[index], value_of(type, v));
    else std::printf("%s %.17g\n", names[index], static_cast<double>(v));
  }
}

void ascent(int64_t row_size, int64_t channels, bool channels_last) {
  constexpr int64_t rows = 2;
  std::vector<float> t[4];
  for (auto& values : t)
    for (int64_t i = 0; i < rows * row_size; ++i) values.push_back(static_cast<float>(next_random()));
  for (float& v : t[3]) v *= v;
  const std::vector<float> low(static_cast<size_t>(channels), -0.5f), high(static_cast<size_t>(channels), 0.6f);
  const int32_t step[rows] = {0, 7};
  const bool active[rows] = {true, true};
  const float lr = 0.1f, beta = 0.01f;
  zsu::AscentStepArgs args{};
  static_cast<zsu::AscentStepTensors&>(args) = {
      t[0].data(), t[1].data(), t[2].data(), t[3].data(), step, active, low.data(), high.data(), &lr, &beta,
      rows, row_size, channels, channels, 0, channels_last};
  args.beta1 = 0.9;
  args.beta2 = 0.999;
  args.eps = 1e-8;
  zsu::kernels().ascent_step(args, 0, rows);
  for (const int k : {0, 2, 3})
    for (const float v : t[k]) std::printf("float32 %.9g\n", static_cast<double>(v));
}

// Three images of 7 x 6 pixels, with channels that do not fill vectors.
void winograd(int64_t inputs, int64_t outputs) {
  std::vector<float> x(static_cast<size_t>(3 * 7 * 6 * inputs)), out(static_cast<size_t>(3 * 7 * 6 * outputs));
  std::vector<float> weight(static_cast<size_t>(36 * inputs * 32)), bias(static_cast<size_t>(outputs));
  for (auto* values : {&x, &weight, &bias})
    for (float& v : *values) v = static_cast<float>(next_random());
  for (float& v : weight) v *= 0.05f;
  zsu::WinogradConvArgs args{};
  args.x = x.data();
  args.weight = weight.data();
  args.bias = bias.data();
  args.out = out.data();
  args.height = args.out_height = 7;
  args.width = args.out_width = 6;
  args.inputs = inputs;
  args.outputs = outputs;
  args.padding = 1;
  args.blocks = 1;
  args.block = 32;
  args.tile_rows = args.tile_columns = 2;
  args.tiles = 12;
  args.chunk = 7;
  args.low = -200;
  args.high = 200;
  zsu::kernels().winograd_conv(args, 0, 2);
  // sums of terms of some hundreds, relative to which they are compared
  for (const float v : out) std::printf("float32 %.9g\n", 1e3 + static_cast<double>(v));
}

// Two images of 9 x 10 pixels, 5 x 5 by 2, of outputs that do not fill vectors.
void input_gradient(int64_t inputs, int64_t outputs) {
  std::vector<float> grad(static_cast<size_t>(2 * 5 * 5 * outputs)), weight(static_cast<size_t>(25 * inputs * outputs));
  std::vector<float> to(static_cast<size_t>(2 * 9 * 10 * inputs));
  for (auto* values : {&grad, &weight})
    for (float& v : *values) v = static_cast<float>(next_random());
  zsu::ConvInputGradientArgs args{};
  args.grad = grad.data();
  args.weight = weight.data();
  args.to = to.data();
  args.kernel_height = args.kernel_width = args.out_height = args.out_width = 5;
  args.inputs = inputs;
  args.outputs = outputs;
  args.stride = args.top = args.left = 2;
  args.height = 9;
  args.width = 10;
  zsu::kernels().conv_input_gradient(args, 0, 2 * 9);
  for (const float v : to) std::printf("float32 %.9g\n", 1e2 + static_cast<double>(v)); // relative to sums of products
}

// One block of 16 images of 4 x 9 pixels, 3 x 3, padded by 1.
void blocked(int64_t inputs, int64_t outputs) {
  std::vector<float> x(static_cast<size_t>(inputs * 4 * 9 * 16)), weight(static_cast<size_t>(inputs * 9 * outputs));
  std::vector<float> bias(static_cast<size_t>(outputs)), out(static_cast<size_t>(outputs * 4 * 9 * 16));
  for (auto* values : {&x, &weight, &bias})
    for (float& v : *values) v = static_cast<float>(next_random());
  zsu::BlockedConvArgs args{};
  args.x = x.data();
  args.weight = weight.data();
  args.bias = bias.data();
  args.out = out.data();
  args.inputs = inputs;
  args.outputs = outputs;
  args.height = args.out_height = 4;
  args.width = args.out_width = 9;
  args.kernel_height = args.kernel_width = 3;
  args.top = args.left = 1;
  zsu::kernels().blocked_conv(args, 0, 4);
  for (const float v : out) std::printf("float32 %.9g\n", 1e2 + static_cast<double>(v)); // relative to sums of products
}

} // namespace

int main() {
  std::puts(zsu::kernels().name);
  for (const int64_t classes : {1, 10, 37, 200}) {
    signed_loss<float, float>(zsu::Storage::float32, classes);
    signed_loss<double, double>(zsu::Storage::float64, classes);
    signed_loss<uint16_t, float>(zsu::Storage::bfloat16, classes);
    signed_loss<uint16_t, float>(zsu::Storage::float16, classes);
  }
  ascent(3 * 7 * 5, 3, false);
  ascent(3 * 16, 3, true);
  winograd(5, 19);
  winograd(16, 32);
  input_gradient(3, 19);
  input_gradient(1, 8);
  blocked(2, 7);
}
