// torch's batch norm of a CPU on these kernels, by its stable interface.
#include <algorithm>
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

// What a list holds, each as torch's stack does.
std::vector<int64_t> items_of(StableIValue value) {
  StableListHandle list = (StableListHandle)value;
  size_t size = 0;
  TORCH(torch_list_size(list, &size));
  std::vector<int64_t> out(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue item;
    TORCH(torch_list_get_item(list, i, &item));
    out[i] = int64_t(item);
  }
  TORCH(torch_delete_list(list));
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

// What TrueNorm's layers ask beyond torch's: what stands behind the affine map, and of what values
// the moments are.
struct Options {
  Act act = Act::none;
  Tensor residual, mask;
  std::vector<int64_t> groups;  // examples of each that is normalized by itself; empty for one
  double rmax = 1, dmax = 0;    // the limits of batch renormalization
  int64_t count() const { return groups.empty() ? 1 : int64_t(groups.size()); }
  bool renormalizes() const { return rmax > 1 || dmax > 0; }
};

// Points `job` at what stands behind, in x's order; a residual of another order is copied.
void put_options(Job& job, const Options& options, const Tensor& x, Order order, Tensor& copy) {
  job.act = options.act;
  if (options.residual) job.residual = in_order(options.residual, order, x, copy).data();
  job.rmax = options.rmax;
  job.dmax = options.dmax;
  if (!options.mask) return;
  job.mask = options.mask.data<uint8_t>();
  if (job.S > 1) job.layout = Layout::planes;  // whose runs can be cut
}

// Takes a pointer on, if it points anywhere.
template <class T>
void take_on(T*& p, int64_t bytes) {
  if (p) p = (T*)((const char*)p + bytes);
}

// The jobs of the groups of examples, each of which points at what is its own.
std::vector<Job> groups_of(const Job& whole, const Options& options) {
  std::vector<Job> jobs;
  int64_t first = 0, examples = whole.N / whole.rows;
  for (int64_t i = 0; i < options.count(); ++i) {
    int64_t size = options.groups.empty() ? examples : options.groups[i];
    if (size < 0 || first + size > examples) throw std::runtime_error("groups beyond the batch");
    Job job = whole;
    int64_t row = first * whole.rows, bytes = row * whole.C * whole.S * bytes_of(whole.dtype);
    job.N = size * whole.rows;
    for (auto p : {&job.x, &job.residual, &job.dy, &job.out}) take_on(*p, bytes);
    for (auto p : {&job.y, &job.dx, &job.dresidual}) take_on(*p, bytes);
    for (auto p : {&job.mean, &job.var, &job.r, &job.d, &job.sum, &job.product}) {
      take_on(*p, i * whole.C * 8);
    }
    take_on(job.mask, row * whole.S);
    job.count = job.N * job.S;
    if (job.C == 1) {  // all is one run
      job.S = job.count;
      job.N = 1;
      job.layout = Layout::planes;
    }
    for (int64_t k = 0; job.mask && k < job.N * job.S; ++k) job.count -= !job.mask[k];
    jobs.push_back(job);
    first += size;
  }
  if (first != examples) throw std::runtime_error("groups must make up the batch");
  return jobs;
}

// Has each group worked on by all threads; small ones side by side, by a thread each.
void work(void (*kernel)(Job&), std::vector<Job>& groups) {
  bool small = groups.size() > 1 && groups[0].parallel;
  for (Job& job : groups) small = small && job.N * job.C * job.S <= SMALL;
  if (!small) {
    for (Job& job : groups) kernel(job);
    return;
  }
  struct Context {
    Job* jobs;
    void (*kernel)(Job&);
  } context = {groups.data(), kernel};
  groups[0].parallel(int64_t(groups.size()), &context, [](int64_t from, int64_t to, void* at) {
    Context& context = *(Context*)at;
    for (int64_t i = from; i < to; ++i) context.kernel(context.jobs[i]);
  });
}

// Moves a running statistic of C channels by those of the groups, (G, C), as if they came one after
// another, so that a batch moves it equally far in any number of groups; at a momentum of 1, by
// their sizes.
void track(const Tensor& running, const double* of_group, const std::vector<double>& counts,
           int64_t C, double momentum, bool unbiased) {
  std::vector<double> now, moved(C);
  read(running, C, now);
  double all = 0, later = 1;
  for (double count : counts) all += count;
  for (double count : counts) {
    double share = count / all, keep = 1 - momentum;
    later -= share;
    double weight = share * momentum, factor = unbiased ? count / (count - 1) : 1;
    if (counts.size() > 1 && momentum < 1) {
      weight = (1 - std::pow(keep, share)) * std::pow(keep, std::max(later, 0.0));
    }
    for (int64_t c = 0; c < C; ++c) moved[c] += weight * (of_group[c] * factor);
    of_group += C;
  }
  for (int64_t c = 0; c < C; ++c) {
    now[c] = momentum == 1 ? moved[c] : moved[c] + (1 - momentum) * now[c];
  }
  write(now.data(), C, running);
}

// (G, C) each; r and d of batch renormalization alone.
struct Moments {
  std::vector<double> mean, var, r, d;
};

// Whether all of a batch's moments are, also in float32; no value that is not finite leaves them so.
bool finite(const double* moments, int64_t size) {
  bool all = true;
  for (int64_t i = 0; i < size; ++i) all = all && std::isfinite(float(moments[i]));
  return all;
}

struct Forward {
  Tensor y;
  Moments moments;
  bool finite = true;
};

// guard: leave the running statistics alone if the batch's are not finite.
Forward forward(const Tensor& given, const Tensor& weight, const Tensor& bias,
                const Tensor& running_mean, const Tensor& running_var, bool training,
                double momentum, double eps, bool guard, const Options& options = {}) {
  Tensor copy, copied_residual;
  Order order = order_of(given);
  const Tensor& x = in_order(given, order, given, copy);
  Job job = job_of(x, order, training);
  int64_t C = job.C, all = C * options.count();
  job.eps = eps;
  use_threads(job);
  put_options(job, options, x, order, copied_residual);
  std::vector<double> weights, biases, now_mean, now_var;
  job.weight = read(weight, C, weights);
  job.bias = read(bias, C, biases);
  job.train = training;
  Forward out;
  Moments& found = out.moments;
  found.mean.resize(all);
  found.var.resize(all);
  if (!training) {
    read(running_mean, C, found.mean);
    read(running_var, C, found.var);
  } else if (options.renormalizes()) {
    found.r.resize(all);
    found.d.resize(all);
    job.r = found.r.data();
    job.d = found.d.data();
    job.running_mean = read(running_mean, C, now_mean);
    job.running_var = read(running_var, C, now_var);
  }
  job.mean = found.mean.data();
  job.var = found.var.data();
  out.y = empty_like(x, order);
  job.y = out.y.data();
  std::vector<Job> groups = groups_of(job, options);
  work(kernels->forward, groups);
  if (!training) return out;
  out.finite = finite(found.mean.data(), all) && finite(found.var.data(), all);
  if ((guard && !out.finite) || momentum == 0) return out;
  std::vector<double> counts;
  for (const Job& group : groups) counts.push_back(double(group.count));
  if (running_mean) track(running_mean, found.mean.data(), counts, C, momentum, false);
  if (running_var) track(running_var, found.var.data(), counts, C, momentum, true);
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
  std::vector<int64_t> items = items_of(value);
  Wanted wanted;
  bool* all[] = {&wanted.x, &wanted.weight, &wanted.bias, &wanted.residual};
  for (size_t i = 0; i < items.size() && i < 4; ++i) *all[i] = flag(StableIValue(items[i]));
  return wanted;
}

struct Gradients {
  Tensor x, weight, bias, residual;
};

// By mean and biased variance, (G, C), of the batch if `training`, else given.
Gradients backward(const Tensor& grad, const Tensor& given, const Tensor& weight,
                   const Tensor& bias, Moments& moments, bool training, double eps, Wanted wanted,
                   int32_t dtype, const Options& options = {}, const Tensor& output = {}) {
  Tensor copy, copied_grad, copied_residual, copied_output;
  Order order = order_of(given);
  const Tensor& x = in_order(given, order, given, copy);
  const Tensor& dy = in_order(grad, order, x, copied_grad);
  Job job = job_of(x, order, training);
  int64_t C = job.C, all = C * options.count();
  if (int64_t(moments.mean.size()) != all) throw std::runtime_error("moments of other groups");
  job.eps = eps;
  use_threads(job);
  put_options(job, options, x, order, copied_residual);
  if (output) job.out = in_order(output, order, x, copied_output).data();
  std::vector<double> weights, biases, sums(all), products(all);
  job.weight = read(weight, C, weights);
  job.bias = read(bias, C, biases);
  job.train = training;
  job.mean = moments.mean.data();
  job.var = moments.var.data();
  if (!moments.r.empty()) {
    job.r = moments.r.data();
    job.d = moments.d.data();
  }
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
  std::vector<Job> groups = groups_of(job, options);
  if ((training && wanted.x) || affine) {
    work(sweep ? kernels->backward : kernels->sums, groups);
  } else if (sweep) {
    work(kernels->gradient, groups);
  }
  std::vector<double> of_weight(C), of_bias(C);
  for (int64_t i = 0; affine && i < all; ++i) {
    double slope = products[i] / std::sqrt(moments.var[i] + eps);
    if (job.r) slope = slope * moments.r[i] + sums[i] * moments.d[i];
    of_weight[i % C] += slope;
    of_bias[i % C] += sums[i];
  }
  if (wanted.weight) out.weight = written(of_weight.data(), C, dtype);
  if (wanted.bias) out.bias = written(of_bias.data(), C, dtype);
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
  int64_t C = training ? int64_t(out.moments.mean.size()) : 0;
  stack[0] = give(std::move(out.y));
  stack[1] = give(written(out.moments.mean.data(), C, dtype));
  stack[2] = give(training ? inverse_of(out.moments.var, eps, dtype) : empty(0, dtype));
}

// native_batch_norm_backward(grad_out, input, weight?, running_mean?, running_var?, save_mean?,
//   save_invstd?, train, eps, output_mask) -> (grad_input, grad_weight, grad_bias)
void native_batch_norm_backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad = tensor(stack[0]), x = tensor(stack[1]), weight = optional(stack[2]),
         running_mean = optional(stack[3]), running_var = optional(stack[4]),
         saved_mean = optional(stack[5]), saved_inverse = optional(stack[6]);
  bool training = flag(stack[7]);
  double eps = number(stack[8]);
  Moments moments;
  int64_t C = x.sizes()[1];
  const Tensor& center = training ? saved_mean : running_mean;
  read(center, C, moments.mean);
  read(training ? saved_inverse : running_var, C, moments.var);
  if (training) {
    for (double& v : moments.var) v = 1 / (v * v) - eps;
  }
  int32_t dtype = weight ? weight.dtype() : dtype_of_statistics(x, weight, {}, center);
  Gradients out = backward(grad, x, weight, {}, moments, training, eps, wanted_of(stack[9]), dtype);
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
  stack[1] = give(written(out.moments.mean.data(), int64_t(out.moments.mean.size()), dtype));
  stack[2] = give(inverse_of(out.moments.var, eps, dtype));
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
    "track(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, Tensor count,"
    " float momentum) -> Tensor",
    "moments(Tensor x, Tensor? mask=None, int[] groups=[]) -> Tensor",
    "batch_norm_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias,"
    " Tensor(a!) running_mean, Tensor(b!) running_var, bool training, float momentum, float eps,"
    " int act, Tensor? mask=None, int[] groups=[], float rmax=1., float dmax=0.)"
    " -> (Tensor, Tensor, Tensor)",
    "batch_norm_act_backward(Tensor grad, Tensor x, Tensor? residual, Tensor? output,"
    " Tensor? weight, Tensor? bias, Tensor moments, bool training, float eps, int act,"
    " bool[4] output_mask, Tensor? mask=None, int[] groups=[])"
    " -> (Tensor, Tensor, Tensor, Tensor)",
};

Act act_of(StableIValue value) {
  int64_t act = (int64_t)value;
  if (act < 0 || act >= int64_t(Act::count)) throw std::runtime_error("no such activation");
  return Act(act);
}

// (G, C) each, as (K, G, C) of float64.
Tensor table_of(const std::vector<const std::vector<double>*>& rows, int64_t groups) {
  int64_t size = int64_t(rows[0]->size());
  int64_t sizes[] = {int64_t(rows.size()), groups, size / groups};
  int64_t strides[] = {size, sizes[2], 1};
  Tensor table = empty(3, sizes, strides, aoti_torch_dtype_float64());
  double* to = table.data<double>();
  for (const auto* row : rows) to = std::copy(row->begin(), row->end(), to);
  return table;
}
Tensor table_of(const Moments& moments, int64_t groups) {
  if (moments.r.empty()) return table_of({&moments.mean, &moments.var}, groups);
  return table_of({&moments.mean, &moments.var, &moments.r, &moments.d}, groups);
}

Moments moments_in(const Tensor& table) {
  const int64_t* sizes = table.sizes();
  int64_t size = sizes[1] * sizes[2];
  const double* at = table.data<double>();
  Moments out;
  out.mean.assign(at, at + size);
  out.var.assign(at + size, at + 2 * size);
  if (sizes[0] == 4) {
    out.r.assign(at + 2 * size, at + 3 * size);
    out.d.assign(at + 3 * size, at + 4 * size);
  }
  return out;
}

void moments(StableIValue* stack, uint64_t, uint64_t) {
  Tensor given = tensor(stack[0]), copy;
  Options options;
  options.mask = optional(stack[1]);
  options.groups = items_of(stack[2]);
  Order order = order_of(given);
  const Tensor& x = in_order(given, order, given, copy);
  Job job = job_of(x, order, true);
  use_threads(job);
  put_options(job, options, x, order, copy);
  Moments found;
  found.mean.resize(job.C * options.count());
  found.var.resize(job.C * options.count());
  job.mean = found.mean.data();
  job.var = found.var.data();
  std::vector<Job> groups = groups_of(job, options);
  work(kernels->moments, groups);
  stack[0] = give(table_of(found, options.count()));
}

// Moves the running statistics by mean and biased variance, (G, C), of groups of count, (G, 1),
// values a channel, all of float64; tells what _batch_norm_with_update does in its reserve.
void track(StableIValue* stack, uint64_t, uint64_t) {
  Tensor running_mean = tensor(stack[0]), running_var = tensor(stack[1]), mean = tensor(stack[2]),
         var = tensor(stack[3]), count = tensor(stack[4]);
  int64_t groups = mean.sizes()[0], C = mean.sizes()[1];
  const double *m = mean.data<double>(), *v = var.data<double>(), *n = count.data<double>();
  bool good = finite(m, groups * C) && finite(v, groups * C);
  if (good) {
    std::vector<double> counts(n, n + groups);
    track(running_mean, m, counts, C, number(stack[5]), false);
    track(running_var, v, counts, C, number(stack[5]), true);
  }
  stack[0] = give(told(good));
}

// The output; mean and biased variance by which it was normalized, and r and d of renormalization,
// (2 or 4, G, C) of float64; and what _batch_norm_with_update tells in its reserve.
void batch_norm_act(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x = tensor(stack[0]);
  Options options;
  options.residual = optional(stack[1]);
  Tensor weight = optional(stack[2]), bias = optional(stack[3]), mean = tensor(stack[4]),
         var = tensor(stack[5]);
  options.act = act_of(stack[9]);
  options.mask = optional(stack[10]);
  options.groups = items_of(stack[11]);
  options.rmax = number(stack[12]);
  options.dmax = number(stack[13]);
  Forward out = forward(x, weight, bias, mean, var, flag(stack[6]), number(stack[7]),
                        number(stack[8]), true, options);
  stack[0] = give(std::move(out.y));
  stack[1] = give(table_of(out.moments, options.count()));
  stack[2] = give(told(out.finite));
}

void batch_norm_act_backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad = tensor(stack[0]), x = tensor(stack[1]);
  Options options;
  options.residual = optional(stack[2]);
  Tensor output = optional(stack[3]), weight = optional(stack[4]), bias = optional(stack[5]),
         table = tensor(stack[6]);
  options.act = act_of(stack[9]);
  options.mask = optional(stack[11]);
  options.groups = items_of(stack[12]);
  Moments moments = moments_in(table);
  int32_t dtype = weight ? weight.dtype() : bias ? bias.dtype() : x.dtype();
  Gradients out = backward(grad, x, weight, bias, moments, flag(stack[7]), number(stack[8]),
                           wanted_of(stack[10]), dtype, options, output);
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
    put(own, "track", track);
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
