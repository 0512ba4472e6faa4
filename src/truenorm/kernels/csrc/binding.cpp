// torch's batch norm of a CPU on these kernels, by its stable interface.
#include <cmath>
#include <string>

#include "tensors.h"

namespace truenorm {

const Kernels* find_kernels(const char* name);

namespace {

const Kernels* kernels = nullptr;

// ---- values on torch's stack: this code owns what it is given, and gives away what it returns

Tensor tensor(StableIValue value) { return Tensor((AtenTensorHandle)value); }

Tensor optional(StableIValue value) {
  if (!value) return {};
  StableIValue* held = (StableIValue*)value;
  Tensor out((AtenTensorHandle)*held);
  delete held;
  bool defined = false;
  TORCH(aoti_torch_is_defined(out.at, &defined));
  return defined ? std::move(out) : Tensor();
}

double number(StableIValue value) {
  double out;
  std::memcpy(&out, &value, 8);
  return out;
}
bool flag(StableIValue value) {
  bool out;
  std::memcpy(&out, &value, 1);
  return out;
}

struct Wanted {
  bool x = false, weight = false, bias = false;
  explicit Wanted(StableIValue value) {
    StableListHandle list = (StableListHandle)value;
    bool* all[] = {&x, &weight, &bias};
    for (size_t i = 0; i < 3; ++i) {
      StableIValue item;
      TORCH(torch_list_get_item(list, i, &item));
      *all[i] = flag(item);
    }
    TORCH(torch_delete_list(list));
  }
};

StableIValue give(Tensor&& t) { return (StableIValue)(t ? t.release() : undefined().release()); }

// ---- batch norm as torch defines it

// The dtype of what is remembered of the batch: as torch has it, that of the parameters.
int32_t dtype_of_statistics(const Tensor& x, const Tensor& weight, const Tensor& bias,
                            const Tensor& mean) {
  for (const Tensor* t : {&weight, &bias, &mean}) {
    if (*t) return t->dtype();
  }
  return x.dtype();
}

void track(const Tensor& running, const double* batch, int64_t size, double momentum,
           double factor) {
  std::vector<double> now;
  read(running, size, now);
  for (int64_t i = 0; i < size; ++i) {
    double new_value = momentum * (batch[i] * factor);
    now[i] = momentum == 1 ? new_value : new_value + (1 - momentum) * now[i];
  }
  write(now.data(), size, running);
}

struct Forward {
  Tensor y, mean, inverse;
  bool finite = true;
};

// guard: leave the running statistics alone if the batch's are not finite.
Forward forward(const Tensor& given, const Tensor& weight, const Tensor& bias,
                const Tensor& running_mean, const Tensor& running_var, bool training,
                double momentum, double eps, bool guard) {
  Tensor copy;
  Order order = order_of(given);
  const Tensor& x = in_order(given, order, given, copy);
  Job job = job_of(x, order);
  int64_t C = job.C;
  job.eps = eps;
  use_threads(job);
  std::vector<double> weights, biases, means(C), vars(C);
  job.weight = read(weight, C, weights);
  job.bias = read(bias, C, biases);
  job.train = training;
  if (!training) {
    read(running_mean, C, means);
    read(running_var, C, vars);
  }
  job.mean = means.data();
  job.var = vars.data();
  Forward out;
  out.y = empty_like(x, order);
  job.y = out.y.data();
  int32_t dtype = dtype_of_statistics(x, weight, bias, running_mean);
  kernels->forward(job);
  if (!training) {
    out.mean = empty(0, dtype);
    out.inverse = empty(0, dtype);
    return out;
  }
  out.mean = written(means.data(), C, dtype);
  double count = double(job.count);
  for (int64_t c = 0; c < C; ++c) {
    out.finite = out.finite && std::isfinite(float(means[c])) && std::isfinite(float(vars[c]));
  }
  if (running_mean && !(guard && !out.finite)) track(running_mean, means.data(), C, momentum, 1);
  if (running_var && !(guard && !out.finite)) {
    track(running_var, vars.data(), C, momentum, count / (count - 1));
  }
  for (double& var : vars) var = 1 / std::sqrt(var + eps);
  out.inverse = written(vars.data(), C, dtype);
  return out;
}

struct Gradients {
  Tensor x, weight, bias;
};

Gradients backward(const Tensor& grad, const Tensor& given, const Tensor& weight,
                   const Tensor& mean, const Tensor& spread, bool training, double eps,
                   Wanted wanted) {
  Tensor copy, copied_grad;
  Order order = order_of(given);
  const Tensor& x = in_order(given, order, given, copy);
  const Tensor& dy = in_order(grad, order, x, copied_grad);
  Job job = job_of(x, order);
  int64_t C = job.C;
  job.eps = eps;
  use_threads(job);
  std::vector<double> weights, means, vars, sums(C), products(C);
  job.weight = read(weight, C, weights);
  read(mean, C, means);
  read(spread, C, vars);
  if (training) {  // what was saved is 1 / sqrt(var + eps)
    for (double& var : vars) var = 1 / (var * var) - eps;
  }
  job.train = training;
  job.mean = means.data();
  job.var = vars.data();
  job.sum = sums.data();
  job.product = products.data();
  job.dy = dy.data();
  Gradients out;
  if (wanted.x) {
    out.x = empty_like(x, order);
    job.dx = out.x.data();
  }
  bool affine = wanted.weight || wanted.bias;
  if (!wanted.x && !affine) return out;
  (training || affine ? wanted.x ? kernels->backward : kernels->sums : kernels->gradient)(job);
  if (!affine) return out;
  int32_t dtype = weight ? weight.dtype() : dtype_of_statistics(x, weight, {}, mean);
  if (wanted.bias) out.bias = written(sums.data(), C, dtype);
  if (wanted.weight) {
    for (int64_t c = 0; c < C; ++c) products[c] /= std::sqrt(vars[c] + eps);
    out.weight = written(products.data(), C, dtype);
  }
  return out;
}

// native_batch_norm(input, weight?, bias?, running_mean?, running_var?, training, momentum, eps)
//   -> (out, save_mean, save_invstd)
void native_batch_norm(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x = tensor(stack[0]), weight = optional(stack[1]), bias = optional(stack[2]),
         mean = optional(stack[3]), var = optional(stack[4]);
  Forward out = forward(x, weight, bias, mean, var, flag(stack[5]), number(stack[6]),
                        number(stack[7]), false);
  stack[0] = give(std::move(out.y));
  stack[1] = give(std::move(out.mean));
  stack[2] = give(std::move(out.inverse));
}

// native_batch_norm_backward(grad_out, input, weight?, running_mean?, running_var?, save_mean?,
//   save_invstd?, train, eps, output_mask) -> (grad_input, grad_weight, grad_bias)
void native_batch_norm_backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad = tensor(stack[0]), x = tensor(stack[1]), weight = optional(stack[2]),
         running_mean = optional(stack[3]), running_var = optional(stack[4]),
         mean = optional(stack[5]), inverse = optional(stack[6]);
  bool training = flag(stack[7]);
  Gradients out = backward(grad, x, weight, training ? mean : running_mean,
                           training ? inverse : running_var, training, number(stack[8]),
                           Wanted(stack[9]));
  stack[0] = give(std::move(out.x));
  stack[1] = give(std::move(out.weight));
  stack[2] = give(std::move(out.bias));
}

// _batch_norm_with_update(input, weight?, bias?, running_mean, running_var, momentum, eps)
//   -> (out, save_mean, save_invstd, reserve); TrueNorm's layers call it. The reserve is empty, and
// has one value if the batch was not finite and the running statistics did not move.
void batch_norm_with_update(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x = tensor(stack[0]), weight = optional(stack[1]), bias = optional(stack[2]),
         mean = tensor(stack[3]), var = tensor(stack[4]);
  Forward out =
      forward(x, weight, bias, mean, var, true, number(stack[5]), number(stack[6]), true);
  Tensor reserve = empty(int64_t(out.finite ? 0 : 1), aoti_torch_dtype_uint8());
  if (!out.finite) *reserve.data<uint8_t>() = 1;
  stack[0] = give(std::move(out.y));
  stack[1] = give(std::move(out.mean));
  stack[2] = give(std::move(out.inverse));
  stack[3] = give(std::move(reserve));
}

// batch_norm_backward(grad_out, input, weight, running_mean?, running_var?, save_mean?, save_var?,
//   update, eps, output_mask, reserve) -> (grad_input, grad_weight, grad_bias)
void batch_norm_backward(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  Tensor weight = tensor(stack[2]), reserve = tensor(stack[10]);
  bool defined = false;
  TORCH(aoti_torch_is_defined(weight.at, &defined));
  stack[2] = 0;
  if (defined) stack[2] = (StableIValue) new StableIValue((StableIValue)weight.release());
  native_batch_norm_backward(stack, inputs, outputs);
}

// ---- which are in force

TorchLibraryHandle for_torch = nullptr, for_truenorm = nullptr;

void put(TorchLibraryHandle to, const char* name, void (*kernel)(StableIValue*, uint64_t, uint64_t)) {
  TORCH(torch_library_impl(to, name, kernel, TORCH_ABI_VERSION));
}

TorchLibraryHandle library() {
  TorchLibraryHandle out;
  TORCH(aoti_torch_library_init_impl("aten", "CPU", __FILE__, __LINE__, &out));
  return out;
}

}  // namespace
}  // namespace truenorm

// Called from Python by name; an error is told as 1, since no exception crosses C.
#define EXPORT extern "C" __attribute__((visibility("default")))

// Take the kernels of an instruction set, or the best that runs here; null if there are none.
EXPORT const char* truenorm_use(const char* name) {
  using namespace truenorm;
  const Kernels* found = find_kernels(name);
  if (!found) return nullptr;
  kernels = found;
  return kernels->name;
}

// Stand behind the operators that TrueNorm's layers call, for good, and behind those of torch.nn's.
EXPORT int truenorm_take_over(int torch_too) try {
  using namespace truenorm;
  if (!for_truenorm) {
    for_truenorm = library();
    put(for_truenorm, "_batch_norm_with_update", batch_norm_with_update);
    put(for_truenorm, "batch_norm_backward", batch_norm_backward);
  }
  if (torch_too && !for_torch) {
    for_torch = library();
    put(for_torch, "native_batch_norm", native_batch_norm);
    put(for_torch, "native_batch_norm_backward", native_batch_norm_backward);
  }
  return 0;
} catch (...) {
  return 1;
}

// Leave torch.nn's batch norm to torch's own kernels again.
EXPORT int truenorm_give_back() {
  using namespace truenorm;
  if (for_torch && aoti_torch_delete_library_object(for_torch)) return 1;
  for_torch = nullptr;
  return 0;
}
