// Activations of a tile and their slopes; the formulas are those of torch.nn.functional.

template <class A>
INLINE A sigmoid_of(A z) {
  return 1 / (1 + exp(-z));
}
template <class A>
INLINE A log1p_exp(A z) {  // softplus with torch's threshold of 20
  return z > 20 ? z : log1p(exp(z));
}
constexpr double SELU_SCALE = 1.0507009873554804934193349852946;
constexpr double SELU_ALPHA = 1.6732632423543772848170429916717;
constexpr double ROOT_HALF = 0.70710678118654752440, PDF = 0.39894228040143267794;
constexpr double GELU_B = 0.79788456080286535588, GELU_K = 0.044715;

#define EACH(VALUE)                        \
  for (int64_t i = 0; i < n; ++i) {        \
    A v = z[i];                            \
    z[i] = (VALUE);                        \
  }                                        \
  return

template <class A>
static void activate(Act act, A* z, int64_t n) {
  switch (act) {
    case Act::relu: EACH(v < 0 ? A(0) : v);
    case Act::leaky_relu: EACH(v > 0 ? v : v * A(0.01));
    case Act::elu: EACH(v > 0 ? v : A(expm1(v)));
    case Act::relu6: EACH(v < 0 ? A(0) : v > 6 ? A(6) : v);
    case Act::silu: EACH(v * sigmoid_of(v));
    case Act::gelu: EACH(v * A(0.5) * (1 + A(erf(v * A(ROOT_HALF)))));
    case Act::gelu_tanh: EACH(v * A(0.5) * (1 + A(tanh(A(GELU_B) * (v + A(GELU_K) * v * v * v)))));
    case Act::mish: EACH(v * A(tanh(log1p_exp(v))));
    case Act::selu: EACH(A(SELU_SCALE) * (v > 0 ? v : A(SELU_ALPHA) * A(expm1(v))));
    case Act::hardswish: EACH(v <= -3 ? A(0) : v >= 3 ? v : v * (v + 3) / 6);
    case Act::hardsigmoid: EACH(v <= -3 ? A(0) : v >= 3 ? A(1) : (v + 3) / 6);
    case Act::sigmoid: EACH(sigmoid_of(v));
    case Act::softplus: EACH(log1p_exp(v));
    case Act::tanh: EACH(A(tanh(v)));
    default: return;
  }
}
#undef EACH

#define EACH(SLOPE)                        \
  for (int64_t i = 0; i < n; ++i) {        \
    A v = z[i];                            \
    dy[i] = (SLOPE);                       \
  }                                        \
  return

// dy *= the slope at what was activated.
template <class A>
static void slope_by_input(Act act, const A* z, A* dy, int64_t n) {
  switch (act) {
    case Act::relu: EACH(v <= 0 ? A(0) : dy[i]);
    case Act::leaky_relu: EACH(v > 0 ? dy[i] : dy[i] * A(0.01));
    case Act::elu: EACH(v > 0 ? dy[i] : dy[i] * A(exp(v)));
    case Act::relu6: EACH(v <= 0 || v >= 6 ? A(0) : dy[i]);
    case Act::silu: {
      for (int64_t i = 0; i < n; ++i) {
        A s = sigmoid_of(z[i]);
        dy[i] *= s * (1 + z[i] * (1 - s));
      }
      return;
    }
    case Act::gelu:
      EACH(dy[i] * (A(0.5) * (1 + A(erf(v * A(ROOT_HALF)))) + v * A(PDF) * A(exp(-v * v / 2))));
    case Act::gelu_tanh: {
      for (int64_t i = 0; i < n; ++i) {
        A v = z[i], t = A(tanh(A(GELU_B) * (v + A(GELU_K) * v * v * v)));
        A inner = A(GELU_B) * (1 + 3 * A(GELU_K) * v * v);
        dy[i] *= A(0.5) * (1 + t) + A(0.5) * v * (1 - t * t) * inner;
      }
      return;
    }
    case Act::mish: {
      for (int64_t i = 0; i < n; ++i) {
        A t = A(tanh(log1p_exp(z[i])));
        dy[i] *= t + z[i] * sigmoid_of(z[i]) * (1 - t * t);
      }
      return;
    }
    case Act::selu: EACH(A(SELU_SCALE) * dy[i] * (v > 0 ? A(1) : A(SELU_ALPHA) * A(exp(v))));
    case Act::hardswish:
      EACH(v <= -3 ? A(0) : v < 3 ? dy[i] * (v / 3 + A(0.5)) : dy[i]);
    case Act::hardsigmoid: EACH(v > -3 && v < 3 ? dy[i] / 6 : A(0));
    case Act::sigmoid: {
      for (int64_t i = 0; i < n; ++i) {
        A s = sigmoid_of(z[i]);
        dy[i] *= s * (1 - s);
      }
      return;
    }
    case Act::softplus: EACH(v > 20 ? dy[i] : dy[i] * sigmoid_of(v));
    case Act::tanh: {
      for (int64_t i = 0; i < n; ++i) {
        A t = A(tanh(z[i]));
        dy[i] *= 1 - t * t;
      }
      return;
    }
    default: return;
  }
}

// dy *= the slope, by what came of it: of activations whose slope is constant in pieces, so that it
// follows from a result of any precision.
template <class A>
static void slope_by_output(Act act, const A* z, A* dy, int64_t n) {
  switch (act) {
    case Act::relu: EACH(v <= 0 ? A(0) : dy[i]);
    case Act::leaky_relu: EACH(v > 0 ? dy[i] : dy[i] * A(0.01));
    case Act::relu6: EACH(v <= 0 || v >= 6 ? A(0) : dy[i]);
    default: return;
  }
}
#undef EACH
