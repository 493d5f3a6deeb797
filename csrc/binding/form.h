// The form of a tensor: what has to be as it was for a step to be repeated, but its memory.
#pragma once

#include <ATen/dlpack.h>

#include <cstdint>
#include <cstring>

namespace fastguide {

constexpr int kMostDimensions = 8;

inline const void* pointer_of(const DLTensor& tensor) {
  return static_cast<const char*>(tensor.data) + tensor.byte_offset;
}

inline bool is_aligned(const DLTensor& tensor) { return reinterpret_cast<uint64_t>(pointer_of(tensor)) % 16 == 0; }

struct Form {
  int32_t dimensions;
  bool aligned;  // to 16 bytes: Triton compiles two kernels
  DLDataType dtype;
  DLDevice device;
  int64_t sizes[kMostDimensions], strides[kMostDimensions];

  static Form of(const DLTensor& tensor) {
    Form form{};
    form.dimensions = tensor.ndim;
    form.aligned = is_aligned(tensor);
    form.dtype = tensor.dtype;
    form.device = tensor.device;
    std::memcpy(form.sizes, tensor.shape, sizeof(int64_t) * tensor.ndim);
    std::memcpy(form.strides, tensor.strides, sizeof(int64_t) * tensor.ndim);
    return form;
  }

  bool is_form_of(const DLTensor& tensor, bool alignment) const {
    return tensor.ndim == dimensions && !(alignment && is_aligned(tensor) != aligned) &&
           std::memcmp(&tensor.dtype, &dtype, sizeof dtype) == 0 &&
           std::memcmp(&tensor.device, &device, sizeof device) == 0 &&
           std::memcmp(tensor.shape, sizes, sizeof(int64_t) * dimensions) == 0 &&
           std::memcmp(tensor.strides, strides, sizeof(int64_t) * dimensions) == 0;
  }
};

}  // namespace fastguide
