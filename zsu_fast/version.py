"""The version, where the build and a source tree that is not installed both find it."""

VERSION = "0.1.0"
