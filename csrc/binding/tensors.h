// Turns torch's tensors into pointers, and checks them: device, dtype, shape, layout, and memory that they share.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "kernels/arguments.h"
#include "maths/element.h"

namespace fastguide {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Element element_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::BFloat16:
      return Element::bfloat16;
    case ScalarType::Half:
      return Element::float16;
    case ScalarType::Double:
      return Element::float64;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16, float16 or float64");
  }
}

// The shape, the inner strides and the device that all tensors of one step share.
struct Layout {
  const int64_t *sizes, *strides;
  int64_t dim, batch, elements_per_sample;
  bool is_cpu;
  int32_t device;
};

// The number of elements, for what depends on nothing else.
struct Extent {
  int64_t batch, elements_per_sample;
};

// Without elements, strides say nothing: any will do.
inline bool is_empty(const Layout& layout) { return layout.batch == 0 || layout.elements_per_sample == 0; }

inline bool dense_within_sample(const Layout& layout) {
  // Walks the dimensions from the innermost out: each stride must be the size of those within.
  int64_t expected = 1, left = 0;
  for (int64_t d = 1; d < layout.dim; ++d) left += layout.sizes[d] > 1;
  while (left > 0) {
    bool found = false;
    for (int64_t d = 1; d < layout.dim && !found; ++d) {
      if (layout.sizes[d] > 1 && layout.strides[d] == expected) {
        expected *= layout.sizes[d];
        found = true;
        --left;
      }
    }
    if (!found) return false;
  }
  return true;
}

inline Layout layout_of(const Tensor& out) {
  Layout layout{out.sizes().data(), out.strides().data(), out.dim(), 0, 1, out.is_cpu(), out.get_device_index()};
  STD_TORCH_CHECK(layout.dim > 0, "out: expected shape (batch, ...), got a tensor without dimensions");
  layout.batch = layout.sizes[0];
  for (int64_t d = 1; d < layout.dim; ++d) layout.elements_per_sample *= layout.sizes[d];
  STD_TORCH_CHECK(is_empty(layout) || dense_within_sample(layout), "out: expected it dense within a sample");
  return layout;
}

inline void check_device(const char* name, const Tensor& tensor, const Layout& layout) {
  STD_TORCH_CHECK(tensor.is_cpu() == layout.is_cpu && (layout.is_cpu || tensor.get_device_index() == layout.device),
                  name, ": expected a tensor on the device of out");
}

// Checks a tensor that should hold so many samples; returns its batch stride.
inline int64_t check_layout(const char* name, const Tensor& tensor, const Layout& layout, int64_t samples) {
  check_device(name, tensor, layout);
  STD_TORCH_CHECK(tensor.dim() == layout.dim, name, ": expected ", layout.dim, " dimensions, got ", tensor.dim());
  const int64_t* sizes = tensor.sizes().data();
  const int64_t* strides = tensor.strides().data();
  STD_TORCH_CHECK(sizes[0] == samples, name, ": expected size ", samples, " in dimension 0, got ", sizes[0]);
  for (int64_t d = 1; d < layout.dim; ++d) {
    STD_TORCH_CHECK(sizes[d] == layout.sizes[d], name, ": expected size ", layout.sizes[d], " in dimension ", d,
                    ", got ", sizes[d]);
  }
  for (int64_t d = 1; d < layout.dim; ++d) {
    STD_TORCH_CHECK(sizes[d] <= 1 || strides[d] == layout.strides[d] || is_empty(layout), name,
                    ": expected out's layout within a sample");
  }
  return strides[0];
}

// A pointer of null would stand for an absent tensor; and a view of freed memory points as far from null as it begins.
inline void check_storage(const char* name, const Tensor& tensor, const Layout& layout) {
  int64_t offset = 0;
  STD_TORCH_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset) == AOTI_TORCH_SUCCESS, name,
                  ": expected a tensor with memory");
  const int64_t begin = reinterpret_cast<int64_t>(tensor.const_data_ptr()) - offset * tensor.element_size();
  STD_TORCH_CHECK(begin != 0 || is_empty(layout), name, ": expected a tensor with memory, got one that was freed");
}

inline Input input_of(const char* name, const Tensor& tensor, const Layout& layout) {
  const int64_t batch_stride = check_layout(name, tensor, layout, layout.batch);
  check_storage(name, tensor, layout);
  return {tensor.const_data_ptr(), batch_stride, element_of(name, tensor)};
}

inline Output output_of(const char* name, const Tensor& tensor, const Layout& layout) {
  const int64_t batch_stride = check_layout(name, tensor, layout, layout.batch);
  STD_TORCH_CHECK(layout.batch <= 1 || batch_stride >= layout.elements_per_sample, name,
                  ": expected samples that do not overlap");
  check_storage(name, tensor, layout);
  return {tensor.mutable_data_ptr(), batch_stride, element_of(name, tensor)};
}

inline Input as_input(const Output& output) { return {output.data, output.batch_stride, output.element}; }

// Integers as if they were numbers of the same 8 bytes, where nothing but their memory counts.
inline Input integers(const int64_t* data, int64_t stride) { return {data, stride, Element::float64}; }

// Checks that an output is an input, element for element, or shares no byte with it: the step would otherwise read what
// it has already written.
inline void check_overlap(const char* output_name, const Output& out, const char* name, const Input& input,
                          const Extent& layout) {
  if (out.data == nullptr || input.data == nullptr) return;
  const int64_t out_bytes = element_bytes(out.element), input_bytes = element_bytes(input.element);
  const int64_t out_stride = layout.batch > 1 ? out.batch_stride * out_bytes : 0;
  const int64_t input_stride = layout.batch > 1 ? input.batch_stride * input_bytes : 0;
  const int64_t out_run = layout.elements_per_sample * out_bytes;
  const int64_t input_run = layout.elements_per_sample * input_bytes;
  const int64_t out_begin = reinterpret_cast<int64_t>(out.data);
  const int64_t input_begin = reinterpret_cast<int64_t>(input.data);
  const int64_t out_end = out_begin + (layout.batch - 1) * out_stride + out_run;
  const int64_t input_end = input_begin + (layout.batch - 1) * input_stride + input_run;
  if (out_end <= input_begin || input_end <= out_begin) return;
  bool fine = false;
  if (out_stride == input_stride) {
    if (out_begin == input_begin) {
      fine = out_bytes == input_bytes;
    } else if (out_stride > 0) {  // interleaved, as two channel groups of one tensor are
      const bool out_first = out_begin < input_begin;
      const int64_t distance = (out_first ? input_begin - out_begin : out_begin - input_begin) % out_stride;
      fine =
          distance >= (out_first ? out_run : input_run) && out_stride - distance >= (out_first ? input_run : out_run);
    }
  }
  STD_TORCH_CHECK(fine, output_name, ": expected memory apart from ", name,
                  ", or the same element for element; got a part of it");
}

// Checks that an output of so many samples shares no byte with another tensor.
inline void check_apart(const char* output_name, const Output& output, int64_t samples, const char* name,
                        const Input& other, const Extent& layout) {
  if (output.data == nullptr || other.data == nullptr || layout.batch == 0) return;
  const int64_t begin = reinterpret_cast<int64_t>(output.data), other_begin = reinterpret_cast<int64_t>(other.data);
  const int64_t size = (samples - 1) * output.batch_stride + layout.elements_per_sample;
  const int64_t other_size = (layout.batch - 1) * other.batch_stride + layout.elements_per_sample;
  STD_TORCH_CHECK(begin + size * element_bytes(output.element) <= other_begin ||
                      other_begin + other_size * element_bytes(other.element) <= begin,
                  output_name, ": expected memory apart from ", name);
}

// Returns StepArguments::channels; streams of noise count the elements of no other layouts.
inline int64_t counted_channels(const Layout& layout) {
  int64_t expected = 1;
  bool contiguous = true, channels_last = layout.dim > 2;
  for (int64_t d = layout.dim - 1; d > 0; --d) {
    contiguous = contiguous && (layout.sizes[d] <= 1 || layout.strides[d] == expected);
    expected *= layout.sizes[d];
  }
  if (contiguous) return 1;
  expected = channels_last ? layout.sizes[1] : 0;
  for (int64_t d = layout.dim - 1; d > 1; --d) {
    channels_last = channels_last && (layout.sizes[d] <= 1 || layout.strides[d] == expected);
    expected *= layout.sizes[d];
  }
  STD_TORCH_CHECK(channels_last && (layout.sizes[1] <= 1 || layout.strides[1] == 1),
                  "seeds, philox: expected a sample that is contiguous or channels_last");
  return layout.sizes[1];
}

// Checks an int64 tensor of shape () or (batch,); returns its values, and 0 or their stride.
inline const int64_t* per_sample(const char* name, const Tensor& tensor, const Layout& layout, int64_t* stride) {
  check_device(name, tensor, layout);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long &&
                      (tensor.dim() == 0 || (tensor.dim() == 1 && tensor.sizes()[0] == layout.batch)),
                  name, ": expected int64 of shape () or (", layout.batch, ",)");
  *stride = tensor.dim() == 0 ? 0 : tensor.strides()[0];
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

}  // namespace fastguide
