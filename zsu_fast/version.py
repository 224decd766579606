"""The version; read by the build, and from a source tree that is not installed."""

VERSION = "0.1.0"
