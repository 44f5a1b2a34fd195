// The compiler's checks of undefined behaviour call these where an access or a sum is wrong.
#include <cstdio>

#include "control.h"

namespace {

struct SourceLocation {
  const char* file;
  uint32_t line;
  uint32_t column;
};

struct TypeMismatch {
  SourceLocation location;
  const void* type;
  unsigned char log_alignment;
  unsigned char kind;
};

std::string at(const SourceLocation& location) {
  return std::string(" at ") + location.file + ":" + std::to_string(location.line);
}

}  // namespace

extern "C" {

[[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(TypeMismatch* data, uintptr_t address) {
  if (address == 0) {
    nexus_shim::stop(cudaErrorIllegalAddress, "null pointer" + at(data->location));
  }
  char text[96];
  snprintf(text, sizeof text, "address 0x%zx is no multiple of %d", static_cast<size_t>(address),
           1 << data->log_alignment);
  nexus_shim::stop(cudaErrorMisalignedAddress, text + at(data->location));
}

[[noreturn]] void __ubsan_handle_out_of_bounds_abort(SourceLocation* location, uintptr_t) {
  nexus_shim::stop(cudaErrorIllegalAddress, "index out of bounds" + at(*location));
}

#define NEXUS_SHIM_OVERFLOW(operation)                                                      \
  [[noreturn]] void __ubsan_handle_##operation##_overflow_abort(SourceLocation* location) { \
    nexus_shim::stop(cudaErrorLaunchFailure, "signed overflow" + at(*location));            \
  }
NEXUS_SHIM_OVERFLOW(add)
NEXUS_SHIM_OVERFLOW(sub)
NEXUS_SHIM_OVERFLOW(mul)
NEXUS_SHIM_OVERFLOW(divrem)
NEXUS_SHIM_OVERFLOW(negate)

}  // extern "C"
