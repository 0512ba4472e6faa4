// The kernels without torch: forward and backward of many shapes, layouts, activations and masks
// against plain loops in double. For processors that this machine only emulates (make aarch64).
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "job.h"

namespace truenorm {
const Kernels* find_kernels(const char* name);
}
using namespace truenorm;

namespace {

struct Case {
  int64_t N, C, S;
  Layout layout;
  bool relu, residual, masked;
};

std::mt19937 random_bits(7);

std::vector<double> drawn(int64_t size, double mean) {
  std::normal_distribution<double> normal(mean, 2);
  std::vector<double> out(size);
  for (double& v : out) v = float(normal(random_bits));
  return out;
}

// Where channel c of place s of example n lies.
int64_t at(const Case& k, int64_t n, int64_t c, int64_t s) { return (n * k.C + c) * k.S + s; }

template <class T>
double error(const Case& k, Dtype dtype) {
  int64_t size = k.N * k.C * k.S, places = k.N * k.S;
  std::vector<double> x = drawn(size, 5), r = drawn(size, 0), dy = drawn(size, 0);
  std::vector<double> weight = drawn(k.C, 1), bias = drawn(k.C, 0);
  std::vector<uint8_t> mask(places, 1);
  for (int64_t i = 0; k.masked && i < places; ++i) mask[i] = random_bits() % 3 != 0;
  std::vector<T> given(x.begin(), x.end()), added(r.begin(), r.end()), grad(dy.begin(), dy.end()),
      y(size), dx(size), dr(size);
  std::vector<double> mean(k.C), var(k.C), sum(k.C), product(k.C);
  int64_t count = 0;
  for (uint8_t shown : mask) count += shown;

  Job job;
  job.layout = k.layout;
  job.dtype = dtype;
  job.N = k.N, job.C = k.C, job.S = k.S;
  job.eps = 1e-5;
  job.act = k.relu ? Act::relu : Act::none;
  job.x = given.data();
  job.residual = k.residual ? added.data() : nullptr;
  job.mask = k.masked ? mask.data() : nullptr;
  job.count = count;
  job.mean = mean.data(), job.var = var.data();
  job.weight = weight.data(), job.bias = bias.data();
  job.y = y.data();
  find_kernels(nullptr)->forward(job);
  job.out = k.residual && k.relu ? y.data() : nullptr;
  job.residual = nullptr;
  job.dy = grad.data(), job.dx = dx.data();
  job.dresidual = k.residual ? dr.data() : nullptr;
  job.sum = sum.data(), job.product = product.data();
  find_kernels(nullptr)->backward(job);

  double worst = 0;
  for (int64_t c = 0; c < k.C; ++c) {
    double m = 0, v = 0, s = 0, p = 0;
    auto each = [&](auto f) {
      for (int64_t n = 0; n < k.N; ++n) {
        for (int64_t i = 0; i < k.S; ++i) f(at(k, n, c, i), bool(mask[n * k.S + i]));
      }
    };
    each([&](int64_t i, bool shown) { m += shown ? x[i] / count : 0; });
    each([&](int64_t i, bool shown) { v += shown ? (x[i] - m) * (x[i] - m) / count : 0; });
    double inverse = 1 / std::sqrt(v + 1e-5);
    auto before = [&](int64_t i) {
      return (x[i] - m) * inverse * weight[c] + bias[c] + (k.residual ? r[i] : 0);
    };
    // By the output: rounding may take what is next to zero to either side.
    auto g = [&](int64_t i) { return k.relu && y[i] <= 0 ? 0 : dy[i]; };
    each([&](int64_t i, bool shown) {
      if (shown) s += g(i), p += g(i) * (x[i] - m);
    });
    each([&](int64_t i, bool shown) {
      double wanted = !shown ? 0 : k.relu ? std::fmax(before(i), 0) : before(i);
      double slope = inverse * weight[c] *
                     (g(i) - s / count - (x[i] - m) * inverse * inverse * p / count);
      worst = std::fmax(worst, std::fabs(y[i] - wanted));
      worst = std::fmax(worst, std::fabs(dx[i] - (shown ? slope : 0)));
      if (k.residual) worst = std::fmax(worst, std::fabs(dr[i] - (shown ? g(i) : 0)));
    });
  }
  return worst;
}

}  // namespace

int main() {
  int64_t shapes[][3] = {{4, 3, 700}, {64, 8, 1}, {3, 5, 49}, {700, 33, 1}, {2, 1, 1000}, {9, 600, 16}};
  int cases = 0, wrong = 0;
  for (auto& shape : shapes) {
    for (int way = 0; way < 8; ++way) {
      Layout layout = shape[2] > 128 || ((way & 4) && shape[2] > 1) ? Layout::planes : Layout::rows;
      Case k = {shape[0], shape[1], shape[2], layout, bool(way & 1), bool(way & 2), bool(way & 4)};
      double single = error<float>(k, Dtype::f32), twice = error<double>(k, Dtype::f64);
      ++cases;
      if (single < 1e-3 && twice < 1e-10) continue;
      ++wrong;
      std::printf("(%ld, %ld, %ld) way %d: float32 %g, float64 %g\n", long(k.N), long(k.C),
                  long(k.S), way, single, twice);
    }
  }
  std::printf("%d cases on %s, %d wrong\n", cases, find_kernels(nullptr)->name, wrong);
  return wrong != 0;
}
