// What a batch norm is asked to do, without a word of torch: sizes, pointers, options.
#pragma once
#include <cstdint>

namespace truenorm {

constexpr int64_t SMALL = 1 << 14;  // values that one thread handles sooner than it wakes others

enum class Dtype : int32_t { f32, f64, bf16, f16 };

// How the values of a channel lie.
// planes: (N, C, S), a channel of an example being a run of S values.
// rows: (N, C * S), the channels side by side, each S columns wide: S is 1 for channels_last and
// for (N, C), more for contiguous maps that are too small to be runs of their own.
enum class Layout : int32_t { planes, rows };

enum class Act : int32_t {
  none, relu, leaky_relu, elu, relu6, silu, gelu, gelu_tanh, mish, selu, hardswish, hardsigmoid,
  sigmoid, softplus, tanh, count
};

// Runs body(first, last, context) over parts of [0, count), on the threads there are.
using Body = void (*)(int64_t first, int64_t last, void* context);
using Parallel = void (*)(int64_t count, void* context, Body body);

struct Job {
  Layout layout;
  Dtype dtype;
  int64_t N, C, S;
  int64_t rows = 1;  // of N that are one example: its positions, where they are rows of their own
  double eps;
  Act act = Act::none;

  const void* x = nullptr;
  const void* residual = nullptr;  // added before the activation
  const uint8_t* mask = nullptr;   // (N, S) of planes, (N,) of rows; 0 where not to be seen
  int64_t count = 0;               // values a channel that are seen

  // Forward; (C,) each, of which the first two are found if `train`, else given.
  bool train = true;
  double* mean = nullptr;
  double* var = nullptr;            // biased
  const double* weight = nullptr;   // null for 1
  const double* bias = nullptr;     // null for 0
  void* y = nullptr;

  // Batch renormalization, (x_hat * r + d), null without: r and d, (C,) each, which a forward finds
  // by the running statistics and the limits, and a backward is given.
  double* r = nullptr;
  double* d = nullptr;
  const double* running_mean = nullptr;
  const double* running_var = nullptr;
  double rmax = 1, dmax = 0;

  // Backward: the sums over a channel of dy and of dy * (x - mean), where dy is the gradient in
  // front of the activation; then dx = a * dy + b * (x - mean) + c. A mean that was rounded is
  // found anew by the way.
  const void* dy = nullptr;
  const void* out = nullptr;  // y of the forward, if the activation's gradient follows from it
  double* sum = nullptr;
  double* product = nullptr;
  void* dx = nullptr;
  void* dresidual = nullptr;

  bool stream = false;  // the result is larger than the caches: written past them

  Parallel parallel = nullptr;  // null for this thread alone
  int64_t threads = 1;
};

// One instruction set's kernels.
struct Kernels {
  const char* name;
  void (*moments)(Job&);   // mean and var
  void (*forward)(Job&);   // mean and var if `train`, and y
  void (*sums)(Job&);      // sum, product
  void (*backward)(Job&);  // those, and dx and dresidual
  void (*gradient)(Job&);  // dx and dresidual, by given sums
};

}  // namespace truenorm
