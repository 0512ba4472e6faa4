// Activations of a tile and their slopes; the formulas are those of torch.nn.functional. A tile is
// worked on in whole vectors: it has room for them, and what lies behind its values is no matter.

constexpr double SELU_SCALE = 1.0507009873554804934193349852946;
constexpr double SELU_ALPHA = 1.6732632423543772848170429916717;
constexpr double ROOT_HALF = 0.70710678118654752440, PDF = 0.39894228040143267794;
constexpr double GELU_B = 0.79788456080286535588, GELU_K = 0.044715;

template <class V>
INLINE V sigmoid_of(V v) {
  return 1 / (1 + exp_of(-v));
}
template <class V>
INLINE V softplus_of(V v) {  // with torch's threshold of 20; no exponential overflows
  V smooth = (v < 0 ? V{} : v) + log1p_of(exp_of(v < 0 ? v : -v));
  return v > 20 ? v : smooth;
}
template <class A>
INLINE vec<A> inside_gelu(vec<A> v) {
  return A(GELU_B) * (v + A(GELU_K) * v * v * v);
}
// tanh(softplus(v)) = m / (m + 2) with m = e (e + 2), e = exp(v); 1 from 20 on.
template <class V>
INLINE V exp_for_mish(V v) {
  return exp_of(v > 20 ? V{} + 20 : v);
}

#define EACH(VALUE)                           \
  for (int64_t i = 0; i < n; i += lanes<A>) { \
    V v = load(z + i);                        \
    store(z + i, V(VALUE));                   \
  }                                           \
  return

template <class A>
static void activate(Act act, A* z, int64_t n) {
  typedef vec<A> V;
  const V zero{}, one = zero + 1;
  switch (act) {
    case Act::relu: EACH(v < 0 ? zero : v);
    case Act::leaky_relu: EACH(v > 0 ? v : v * A(0.01));
    case Act::elu: EACH(v > 0 ? v : expm1_below(v > 0 ? zero : v));
    case Act::relu6: EACH(v < 0 ? zero : (v > 6 ? zero + 6 : v));
    case Act::silu: EACH(v / (1 + exp_of(-v)));
    case Act::gelu: EACH(v * A(0.5) * (1 + erf_of(v * A(ROOT_HALF))));
    case Act::gelu_tanh: EACH(v * A(0.5) * (1 + tanh_of(inside_gelu<A>(v))));
    case Act::mish: {
      for (int64_t i = 0; i < n; i += lanes<A>) {
        V v = load(z + i), e = exp_for_mish(v), m = e * (e + 2);
        store(z + i, v * (m / (m + 2)));
      }
      return;
    }
    case Act::selu:
      EACH(A(SELU_SCALE) * (v > 0 ? v : A(SELU_ALPHA) * expm1_below(v > 0 ? zero : v)));
    case Act::hardswish: EACH(v <= -3 ? zero : (v >= 3 ? v : v * (v + 3) / 6));
    case Act::hardsigmoid: EACH(v <= -3 ? zero : (v >= 3 ? one : (v + 3) / 6));
    case Act::sigmoid: EACH(sigmoid_of(v));
    case Act::softplus: EACH(softplus_of(v));
    case Act::tanh: EACH(tanh_of(v));
    default: return;
  }
}
#undef EACH

#define EACH(SLOPE)                           \
  for (int64_t i = 0; i < n; i += lanes<A>) { \
    V v = load(z + i), g = load(dy + i);      \
    store(dy + i, V(SLOPE));                  \
  }                                           \
  return

// dy *= the slope at what was activated.
template <class A>
static void slope_by_input(Act act, const A* z, A* dy, int64_t n) {
  typedef vec<A> V;
  const V zero{};
  switch (act) {
    case Act::relu: EACH(v <= 0 ? zero : g);
    case Act::leaky_relu: EACH(v > 0 ? g : g * A(0.01));
    case Act::elu: EACH(v > 0 ? g : g * exp_of(v));
    case Act::relu6: EACH((v <= 0) | (v >= 6) ? zero : g);
    case Act::silu: {
      for (int64_t i = 0; i < n; i += lanes<A>) {
        V v = load(z + i), s = sigmoid_of(v);
        store(dy + i, load(dy + i) * (s * (1 + v * (1 - s))));
      }
      return;
    }
    case Act::gelu:
      EACH(g * (A(0.5) * (1 + erf_of(v * A(ROOT_HALF))) + v * A(PDF) * exp_of(-v * v / 2)));
    case Act::gelu_tanh: {
      for (int64_t i = 0; i < n; i += lanes<A>) {
        V v = load(z + i), t = tanh_of(inside_gelu<A>(v));
        V inner = A(GELU_B) * (1 + 3 * A(GELU_K) * v * v);
        store(dy + i, load(dy + i) * (A(0.5) * (1 + t) + A(0.5) * v * (1 - t * t) * inner));
      }
      return;
    }
    case Act::mish: {
      for (int64_t i = 0; i < n; i += lanes<A>) {
        V v = load(z + i), e = exp_for_mish(v), m = e * (e + 2);
        V t = m / (m + 2), s = e / (1 + e);
        store(dy + i, load(dy + i) * (t + v * s * (1 - t * t)));
      }
      return;
    }
    case Act::selu: EACH(A(SELU_SCALE) * g * (v > 0 ? zero + 1 : A(SELU_ALPHA) * exp_of(v)));
    case Act::hardswish: EACH(v <= -3 ? zero : (v < 3 ? g * (v / 3 + A(0.5)) : g));
    case Act::hardsigmoid: EACH((v > -3) & (v < 3) ? g / 6 : zero);
    case Act::sigmoid: {
      for (int64_t i = 0; i < n; i += lanes<A>) {
        V s = sigmoid_of(load(z + i));
        store(dy + i, load(dy + i) * (s * (1 - s)));
      }
      return;
    }
    case Act::softplus: EACH(v > 20 ? g : g * sigmoid_of(v));
    case Act::tanh: {
      for (int64_t i = 0; i < n; i += lanes<A>) {
        V t = tanh_of(load(z + i));
        store(dy + i, load(dy + i) * (1 - t * t));
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
  typedef vec<A> V;
  const V zero{};
  switch (act) {
    case Act::relu: EACH(v <= 0 ? zero : g);
    case Act::leaky_relu: EACH(v > 0 ? g : g * A(0.01));
    case Act::relu6: EACH((v <= 0) | (v >= 6) ? zero : g);
    default: return;
  }
}
#undef EACH
