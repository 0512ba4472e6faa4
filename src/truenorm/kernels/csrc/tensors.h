// torch's tensors by its stable C interface: who owns them, how they lie, what is in them.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "job.h"

namespace truenorm {

inline void check(AOTITorchError error, const char* what) {
  if (error) throw std::runtime_error(std::string("truenorm: ") + what + " failed");
}
#define TORCH(CALL) check(CALL, #CALL)

// A tensor that is owned; of None, and of an undefined tensor, `at` is null.
class Tensor {
 public:
  AtenTensorHandle at = nullptr;

  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : at(handle) {}
  Tensor(Tensor&& other) noexcept : at(std::exchange(other.at, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(at, other.at);
    return *this;
  }
  ~Tensor() {
    if (at) aoti_torch_delete_tensor_object(at);
  }

  explicit operator bool() const { return at; }
  AtenTensorHandle release() { return std::exchange(at, nullptr); }

  int64_t ndim() const {
    int64_t out;
    TORCH(aoti_torch_get_dim(at, &out));
    return out;
  }
  const int64_t* sizes() const {
    int64_t* out;
    TORCH(aoti_torch_get_sizes(at, &out));
    return out;
  }
  const int64_t* strides() const {
    int64_t* out;
    TORCH(aoti_torch_get_strides(at, &out));
    return out;
  }
  int64_t numel() const {
    int64_t out;
    TORCH(aoti_torch_get_numel(at, &out));
    return out;
  }
  int32_t dtype() const {
    int32_t out;
    TORCH(aoti_torch_get_dtype(at, &out));
    return out;
  }
  template <class T = void>
  T* data() const {
    void* out;
    TORCH(aoti_torch_get_data_ptr(at, &out));
    return (T*)out;
  }
};

inline Tensor empty(int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle out;
  TORCH(aoti_torch_empty_strided(ndim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}
inline Tensor empty(int64_t size, int32_t dtype) {
  const int64_t stride = 1;
  return empty(1, &size, &stride, dtype);
}
inline Tensor undefined() {
  AtenTensorHandle out;
  TORCH(aoti_torch_new_uninitialized_tensor(&out));
  return Tensor(out);
}

inline Dtype dtype_of(const Tensor& x) {
  static const int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64(),
                       bf16 = aoti_torch_dtype_bfloat16(), f16 = aoti_torch_dtype_float16();
  int32_t dtype = x.dtype();
  if (dtype == f32) return Dtype::f32;
  if (dtype == f64) return Dtype::f64;
  if (dtype == bf16) return Dtype::bf16;
  if (dtype == f16) return Dtype::f16;
  throw std::runtime_error("batch norm takes float32, float64, bfloat16 or float16");
}

inline int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

// The two ways in which a tensor (N, C, *S) lies dense.
enum class Order { contiguous, channels_last };

// The i-th axis from the innermost: the positions from the last, and before or after them the
// channels, then the examples.
inline int64_t axis_of(Order order, int64_t ndim, int64_t i) {
  if (order == Order::contiguous) return ndim - 1 - i;
  return i == 0 ? 1 : i == ndim - 1 ? 0 : ndim - i;
}

inline bool dense(const Tensor& x, Order order) {
  int64_t ndim = x.ndim(), step = 1;
  const int64_t *sizes = x.sizes(), *strides = x.strides();
  for (int64_t i = 0; i < ndim; ++i) {
    int64_t axis = axis_of(order, ndim, i);
    if (sizes[axis] != 1 && strides[axis] != step) return false;
    step *= sizes[axis];
  }
  return true;
}

// The way in which torch's batch norm lays out the result for x: as its suggest_memory_format says,
// by the strides alone, also of a tensor that is not dense.
inline Order order_of(const Tensor& x) {
  int64_t ndim = x.ndim(), least = 0;
  if (ndim != 4 && ndim != 5) return Order::contiguous;
  const int64_t *sizes = x.sizes(), *strides = x.strides();
  if (!strides[1]) return Order::contiguous;
  for (int64_t i = 0; i < ndim; ++i) {
    int64_t axis = axis_of(Order::channels_last, ndim, i);
    if (!sizes[axis] || strides[axis] < least) return Order::contiguous;
    if (axis == 0 && least == strides[1]) return Order::contiguous;  // all other axes are of one
    least = strides[axis] * (sizes[axis] > 1 ? sizes[axis] : 1);
  }
  return Order::channels_last;
}

inline Tensor empty_like(const Tensor& x, Order order) {
  int64_t ndim = x.ndim(), step = 1;
  const int64_t* sizes = x.sizes();
  std::vector<int64_t> strides(ndim);
  for (int64_t i = 0; i < ndim; ++i) {
    int64_t axis = axis_of(order, ndim, i);
    strides[axis] = step;
    step *= sizes[axis] > 1 ? sizes[axis] : 1;
  }
  return empty(ndim, sizes, strides.data(), x.dtype());
}

// x itself if it lies so already and is of like's dtype, else a copy kept in `copy`.
inline const Tensor& in_order(const Tensor& x, Order order, const Tensor& like, Tensor& copy) {
  if (x.dtype() == like.dtype() && dense(x, order)) return x;
  copy = empty_like(like, order);
  TORCH(aoti_torch_copy_(copy.at, x.at, 0));
  return copy;
}

// Bytes from which results are written past the caches: in a step of training, whose tensors wait
// for the backward pass, much sooner than where only the result is wanted, and soon.
constexpr int64_t STREAMED_IN_TRAINING = 3 << 20, STREAMED = 12 << 20;
constexpr int64_t WIDEST = 128;  // positions up to which contiguous maps are worked on as rows

inline Job job_of(const Tensor& x, Order order, bool training) {
  int64_t ndim = x.ndim();
  const int64_t* sizes = x.sizes();
  if (ndim < 2) throw std::runtime_error("batch norm takes an input of at least two axes");
  Job job;
  job.dtype = dtype_of(x);
  job.N = sizes[0];
  job.C = sizes[1];
  job.S = 1;
  for (int64_t i = 2; i < ndim; ++i) job.S *= sizes[i];
  job.layout = job.S <= WIDEST ? Layout::rows : Layout::planes;
  if (order == Order::channels_last) {
    job.rows = job.S;
    job.N *= job.S;
    job.S = 1;
    job.layout = Layout::rows;
  }
  job.count = job.N * job.S;
  job.x = x.data();
  job.stream = job.N * job.C * job.S * bytes_of(job.dtype) >= (training ? STREAMED_IN_TRAINING : STREAMED);
  return job;
}

inline void in_parallel(int64_t count, void* context, Body body) {
  torch_parallel_for(0, count, 1, body, context);
}
inline void use_threads(Job& job) {
  if (job.N * job.C * job.S <= SMALL) return;
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  job.threads = threads;
  job.parallel = in_parallel;
}

inline float float_of(uint16_t bits, Dtype dtype) {
  uint32_t wide = uint32_t(bits) << 16;
  float out;
  if (dtype == Dtype::f16) {
    uint32_t rest = bits & 0x7fff, sign = uint32_t(bits & 0x8000) << 16;
    if (rest < 0x400) return (sign ? -1.0f : 1.0f) * float(rest) * 0x1p-24f;
    wide = sign | (rest >= 0x7c00 ? 0x7f800000 | (rest & 0x3ff) << 13 : (rest << 13) + (112u << 23));
  }
  std::memcpy(&out, &wide, 4);
  return out;
}

// (C,) values as doubles; null of none.
inline const double* read(const Tensor& t, int64_t size, std::vector<double>& to) {
  if (!t) return nullptr;
  if (t.numel() != size) throw std::runtime_error("a parameter of batch norm is not of size C");
  Dtype dtype = dtype_of(t);
  int64_t step = t.ndim() ? t.strides()[0] : 1;
  to.resize(size);
  const void* p = t.data();
  for (int64_t i = 0; i < size; ++i) {
    int64_t at = i * step;
    to[i] = dtype == Dtype::f32   ? double(((const float*)p)[at])
            : dtype == Dtype::f64 ? ((const double*)p)[at]
                                  : double(float_of(((const uint16_t*)p)[at], dtype));
  }
  return to.data();
}

// Doubles as a (C,) tensor; a half-precision one by way of float32, as torch rounds.
inline void write(const double* from, int64_t size, const Tensor& t) {
  Dtype dtype = dtype_of(t);
  int64_t step = t.ndim() ? t.strides()[0] : 1;
  if (dtype == Dtype::f64) {
    for (int64_t i = 0; i < size; ++i) t.data<double>()[i * step] = from[i];
  } else if (dtype == Dtype::f32) {
    float* to = t.data<float>();
    for (int64_t i = 0; i < size; ++i) to[i * step] = float(from[i]);
  } else {
    Tensor single = empty(size, aoti_torch_dtype_float32());
    for (int64_t i = 0; i < size; ++i) single.data<float>()[i] = float(from[i]);
    TORCH(aoti_torch_copy_(t.at, single.at, 0));
  }
}
inline Tensor written(const double* from, int64_t size, int32_t dtype) {
  Tensor out = empty(size, dtype);
  write(from, size, out);
  return out;
}

}  // namespace truenorm
