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

// What stands behind the affine map.
struct After {
  Act act = Act::none;
  Tensor residual, mask;
};

// Lets `job` see what a mask (N, *S) shows, and that alone.
void show(Job& job, const Tensor& mask) {
  job.mask = mask.data<uint8_t>();
  if (job.S > 1) job.layout = Layout::planes;  // whose runs can be cut
  int64_t places = job.N * job.S;
  job.count = 0;
  for (int64_t i = 0; i < places; ++i) job.count += job.mask[i] != 0;
}

// Points `job` at what stands behind, in x's order; a residual of another order is copied.
void put_after(Job& job, const After& after, const Tensor& x, Order order, Tensor& copy) {
  job.act = after.act;
  if (after.residual) job.residual = in_order(after.residual, order, x, copy).data();
  if (after.mask) show(job, after.mask);
}

struct Forward {
  Tensor y;
  std::vector<double> mean, var;
  bool finite = true;
};

// guard: leave the running statistics alone if the batch's are not finite.
Forward forward(const Tensor& given, const Tensor& weight, const Tensor& bias,
                const Tensor& running_mean, const Tensor& running_var, bool training,
                double momentum, double eps, bool guard, const After& after = {}) {
  Tensor copy, copied_residual;
  Order order = order_of(given);
  const Tensor& x = in_order(given, order, given, copy);
  Job job = job_of(x, order, training);
  int64_t C = job.C;
  job.eps = eps;
  use_threads(job);
  put_after(job, after, x, order, copied_residual);
  std::vector<double> weights, biases;
  job.weight = read(weight, C, weights);
  job.bias = read(bias, C, biases);
  job.train = training;
  Forward out;
  out.mean.resize(C);
  out.var.resize(C);
  if (!training) {
    read(running_mean, C, out.mean);
    read(running_var, C, out.var);
  }
  job.mean = out.mean.data();
  job.var = out.var.data();
  out.y = empty_like(x, order);
  job.y = out.y.data();
  kernels->forward(job);
  if (!training) return out;
  double count = double(job.count);
  for (int64_t c = 0; c < C; ++c) {
    out.finite =
        out.finite && std::isfinite(float(out.mean[c])) && std::isfinite(float(out.var[c]));
  }
  if (guard && !out.finite) return out;
  if (running_mean) track(running_mean, out.mean.data(), C, momentum, 1);
  if (running_var) track(running_var, out.var.data(), C, momentum, count / (count - 1));
  return out;
}

// 1 / sqrt(var + eps), as torch remembers it.
Tensor inverse_of(std::vector<double>& var, double eps, int32_t dtype) {
  for (double& v : var) v = 1 / std::sqrt(v + eps);
  return written(var.data(), int64_t(var.size()), dtype);
}

struct Wanted {
  bool x = false, weight = false, bias = false, residual = false;
};

Wanted wanted_of(StableIValue value) {
  StableListHandle list = (StableListHandle)value;
  Wanted wanted;
  bool* all[] = {&wanted.x, &wanted.weight, &wanted.bias, &wanted.residual};
  size_t size = 0;
  TORCH(torch_list_size(list, &size));
  for (size_t i = 0; i < size && i < 4; ++i) {
    StableIValue item;
    TORCH(torch_list_get_item(list, i, &item));
    *all[i] = flag(item);
  }
  TORCH(torch_delete_list(list));
  return wanted;
}

struct Gradients {
  Tensor x, weight, bias, residual;
};

// By the mean and biased variance, (C,), of the batch if `training`, else given.
Gradients backward(const Tensor& grad, const Tensor& given, const Tensor& weight,
                   const Tensor& bias, std::vector<double>& mean, std::vector<double>& var,
                   bool training, double eps, Wanted wanted, int32_t dtype,
                   const After& after = {}, const Tensor& output = {}) {
  Tensor copy, copied_grad, copied_residual, copied_output;
  Order order = order_of(given);
  const Tensor& x = in_order(given, order, given, copy);
  const Tensor& dy = in_order(grad, order, x, copied_grad);
  Job job = job_of(x, order, training);
  int64_t C = job.C;
  job.eps = eps;
  use_threads(job);
  put_after(job, after, x, order, copied_residual);
  if (output) job.out = in_order(output, order, x, copied_output).data();
  std::vector<double> weights, biases, sums(C), products(C);
  job.weight = read(weight, C, weights);
  job.bias = read(bias, C, biases);
  job.train = training;
  job.mean = mean.data();
  job.var = var.data();
  job.sum = sums.data();
  job.product = products.data();
  job.dy = dy.data();
  Gradients out;
  if (wanted.x) {
    out.x = empty_like(x, order);
    job.dx = out.x.data();
  }
  if (wanted.residual) {
    out.residual = empty_like(x, order);
    job.dresidual = out.residual.data();
  }
  bool sweep = wanted.x || wanted.residual, affine = wanted.weight || wanted.bias;
  if ((training && wanted.x) || affine) {
    (sweep ? kernels->backward : kernels->sums)(job);
  } else if (sweep) {
    kernels->gradient(job);
  }
  if (wanted.bias) out.bias = written(sums.data(), C, dtype);
  if (wanted.weight) {
    for (int64_t c = 0; c < C; ++c) products[c] /= std::sqrt(var[c] + eps);
    out.weight = written(products.data(), C, dtype);
  }
  return out;
}

// native_batch_norm(input, weight?, bias?, running_mean?, running_var?, training, momentum, eps)
//   -> (out, save_mean, save_invstd)
void native_batch_norm(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x = tensor(stack[0]), weight = optional(stack[1]), bias = optional(stack[2]),
         mean = optional(stack[3]), var = optional(stack[4]);
  bool training = flag(stack[5]);
  double eps = number(stack[7]);
  Forward out = forward(x, weight, bias, mean, var, training, number(stack[6]), eps, false);
  int32_t dtype = dtype_of_statistics(x, weight, bias, mean);
  int64_t C = training ? int64_t(out.mean.size()) : 0;
  stack[0] = give(std::move(out.y));
  stack[1] = give(written(out.mean.data(), C, dtype));
  stack[2] = give(training ? inverse_of(out.var, eps, dtype) : empty(0, dtype));
}

// native_batch_norm_backward(grad_out, input, weight?, running_mean?, running_var?, save_mean?,
//   save_invstd?, train, eps, output_mask) -> (grad_input, grad_weight, grad_bias)
void native_batch_norm_backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad = tensor(stack[0]), x = tensor(stack[1]), weight = optional(stack[2]),
         running_mean = optional(stack[3]), running_var = optional(stack[4]),
         saved_mean = optional(stack[5]), saved_inverse = optional(stack[6]);
  bool training = flag(stack[7]);
  double eps = number(stack[8]);
  std::vector<double> mean, var;
  int64_t C = x.sizes()[1];
  const Tensor& center = training ? saved_mean : running_mean;
  read(center, C, mean);
  read(training ? saved_inverse : running_var, C, var);
  if (training) {
    for (double& v : var) v = 1 / (v * v) - eps;
  }
  int32_t dtype = weight ? weight.dtype() : dtype_of_statistics(x, weight, {}, center);
  Gradients out = backward(grad, x, weight, {}, mean, var, training, eps, wanted_of(stack[9]), dtype);
  stack[0] = give(std::move(out.x));
  stack[1] = give(std::move(out.weight));
  stack[2] = give(std::move(out.bias));
}

// _batch_norm_with_update(input, weight?, bias?, running_mean, running_var, momentum, eps)
//   -> (out, save_mean, save_invstd, reserve); TrueNorm's layers call it. The reserve is empty, and
// has one value if the batch was not finite and the running statistics did not move.
Tensor told(bool finite) {
  Tensor out = empty(int64_t(finite ? 0 : 1), aoti_torch_dtype_uint8());
  if (!finite) *out.data<uint8_t>() = 1;
  return out;
}
void batch_norm_with_update(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x = tensor(stack[0]), weight = optional(stack[1]), bias = optional(stack[2]),
         mean = tensor(stack[3]), var = tensor(stack[4]);
  double eps = number(stack[6]);
  Forward out = forward(x, weight, bias, mean, var, true, number(stack[5]), eps, true);
  int32_t dtype = dtype_of_statistics(x, weight, bias, mean);
  stack[0] = give(std::move(out.y));
  stack[1] = give(written(out.mean.data(), int64_t(out.mean.size()), dtype));
  stack[2] = give(inverse_of(out.var, eps, dtype));
  stack[3] = give(told(out.finite));
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

// ---- batch norm with what stands behind it, as truenorm::batch_norm_act

const char* const SCHEMAS[] = {
    "batch_norm_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias,"
    " Tensor(a!) running_mean, Tensor(b!) running_var, bool training, float momentum, float eps,"
    " int act, Tensor? mask=None) -> (Tensor, Tensor, Tensor)",
    "batch_norm_act_backward(Tensor grad, Tensor x, Tensor? residual, Tensor? output,"
    " Tensor? weight, Tensor? bias, Tensor moments, bool training, float eps, int act,"
    " bool[4] output_mask, Tensor? mask=None) -> (Tensor, Tensor, Tensor, Tensor)",
    "moments(Tensor x, Tensor? mask=None) -> Tensor",
};

Act act_of(StableIValue value) {
  int64_t act = (int64_t)value;
  if (act < 0 || act >= int64_t(Act::count)) throw std::runtime_error("no such activation");
  return Act(act);
}

// Mean and biased variance as (2, C) of float64.
Tensor table_of(const std::vector<double>& mean, const std::vector<double>& var) {
  int64_t sizes[] = {2, int64_t(mean.size())}, strides[] = {sizes[1], 1};
  Tensor table = empty(2, sizes, strides, aoti_torch_dtype_float64());
  std::memcpy(table.data<double>(), mean.data(), size_t(sizes[1]) * 8);
  std::memcpy(table.data<double>() + sizes[1], var.data(), size_t(sizes[1]) * 8);
  return table;
}

void moments(StableIValue* stack, uint64_t, uint64_t) {
  Tensor given = tensor(stack[0]), mask = optional(stack[1]), copy;
  Order order = order_of(given);
  const Tensor& x = in_order(given, order, given, copy);
  Job job = job_of(x, order, true);
  use_threads(job);
  if (mask) show(job, mask);
  std::vector<double> mean(job.C), var(job.C);
  job.mean = mean.data();
  job.var = var.data();
  kernels->moments(job);
  stack[0] = give(table_of(mean, var));
}

// The output; mean and biased variance by which it was normalized, (2, C) of float64; and what
// _batch_norm_with_update tells in its reserve.
void batch_norm_act(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x = tensor(stack[0]);
  After after;
  after.residual = optional(stack[1]);
  Tensor weight = optional(stack[2]), bias = optional(stack[3]), mean = tensor(stack[4]),
         var = tensor(stack[5]);
  after.act = act_of(stack[9]);
  after.mask = optional(stack[10]);
  Forward out = forward(x, weight, bias, mean, var, flag(stack[6]), number(stack[7]),
                        number(stack[8]), true, after);
  stack[0] = give(std::move(out.y));
  stack[1] = give(table_of(out.mean, out.var));
  stack[2] = give(told(out.finite));
}

void batch_norm_act_backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad = tensor(stack[0]), x = tensor(stack[1]);
  After after;
  after.residual = optional(stack[2]);
  Tensor output = optional(stack[3]), weight = optional(stack[4]), bias = optional(stack[5]),
         moments = tensor(stack[6]);
  after.act = act_of(stack[9]);
  after.mask = optional(stack[11]);
  int64_t C = x.sizes()[1];
  const double* held = moments.data<double>();
  std::vector<double> mean(held, held + C), var(held + C, held + 2 * C);
  int32_t dtype = weight ? weight.dtype() : bias ? bias.dtype() : x.dtype();
  Gradients out = backward(grad, x, weight, bias, mean, var, flag(stack[7]), number(stack[8]),
                           wanted_of(stack[10]), dtype, after, output);
  // An operator of one's own returns defined tensors.
  auto some = [](Tensor& t) {
    return (StableIValue)(t ? t.release() : empty(0, aoti_torch_dtype_float32()).release());
  };
  stack[0] = some(out.x);
  stack[1] = some(out.weight);
  stack[2] = some(out.bias);
  stack[3] = some(out.residual);
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
    TorchLibraryHandle schemas, own;
    TORCH(aoti_torch_library_init_fragment("truenorm", __FILE__, __LINE__, &schemas));
    for (const char* schema : SCHEMAS) TORCH(aoti_torch_library_def(schemas, schema));
    TORCH(aoti_torch_library_init_impl("truenorm", "CPU", __FILE__, __LINE__, &own));
    put(own, "batch_norm_act", batch_norm_act);
    put(own, "batch_norm_act_backward", batch_norm_act_backward);
    put(own, "moments", moments);
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
