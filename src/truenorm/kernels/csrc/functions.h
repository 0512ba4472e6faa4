// Exponentials and what follows from them, of vectors. Single precision is computed here, to two
// units in the last place or so; double, which is seldom used, lane by lane by the C library.

#define EACH_LANE(NAME, CALL)                              \
  INLINE VD NAME(VD v) {                                   \
    VD out;                                                \
    for (int64_t i = 0; i < LD; ++i) out[i] = CALL(v[i]);  \
    return out;                                            \
  }
EACH_LANE(exp_of, exp)
EACH_LANE(expm1_below, expm1)
EACH_LANE(log1p_of, log1p)
EACH_LANE(tanh_of, tanh)
EACH_LANE(erf_of, erf)
#undef EACH_LANE

typedef int32_t VI __attribute__((vector_size(BYTES)));

// x = n log 2 + r with |r| <= log(2) / 2: n, and e^r - 1 by Taylor's series, whose rest is 5e-9.
INLINE VF reduced(VF x, VI& n) {
  const float magic = 12582912;  // 1.5 * 2^23: what is added to it loses its fraction
  VF shifted = x * 1.44269504088896f + magic;
  n = (VI)shifted - (VI)spread(magic);
  VF whole = shifted - magic;
  VF r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;  // log 2 in two parts
  VF rest = 1 / 5040.f + VF{};
  rest = rest * r + 1 / 720.f;
  rest = rest * r + 1 / 120.f;
  rest = rest * r + 1 / 24.f;
  rest = rest * r + 1 / 6.f;
  rest = rest * r + 0.5f;
  return rest * r * r + r;
}
INLINE VF power_of_two(VI n) { return (VF)((n + 127) << 23); }

INLINE VF exp_of(VF x) {
  x = x > 89 ? spread(89.f) : x;
  x = x < -104 ? spread(-104.f) : x;
  VI n;
  VF less_one = reduced(x, n);
  VI half = n >> 1;  // in two steps, the first of which neither overflows nor vanishes
  return (1 + less_one) * power_of_two(half) * power_of_two(n - half);
}

// e^x - 1 of x <= 0.
INLINE VF expm1_below(VF x) {
  x = x < -87 ? spread(-87.f) : x;
  VI n;
  VF less_one = reduced(x, n), scale = power_of_two(n);
  return scale * less_one + (scale - 1);
}

// log(1 + u) of u in [0, 1]: 2 artanh(s) with s = u / (2 + u) <= 1/3; the series' rest is 1e-8.
INLINE VF log1p_of(VF u) {
  VF s = u / (2 + u), q = s * s;
  VF rest = 2 / 13.f + VF{};
  rest = rest * q + 2 / 11.f;
  rest = rest * q + 2 / 9.f;
  rest = rest * q + 2 / 7.f;
  rest = rest * q + 2 / 5.f;
  rest = rest * q + 2 / 3.f;
  return rest * q * s + 2 * s;
}

INLINE VF magnitude(VF x) { return (VF)((VI)x & 0x7fffffff); }
INLINE VF with_sign_of(VF x, VF sign) { return (VF)((VI)x | ((VI)sign & int32_t(0x80000000))); }

INLINE VF tanh_of(VF x) {
  VF less = expm1_below(-2 * magnitude(x));
  return with_sign_of(-less / (less + 2), x);
}

// Up to 1 a polynomial of x^2, and from there 1 - e^p(x); both fitted to 2e-9 of the function.
INLINE VF erf_of(VF x) {
  VF t = magnitude(x), s = x * x;
  VF near = 7.853833812987432e-05f + VF{};
  near = near * s - 8.01018497440964e-04f;
  near = near * s + 5.188326817005873e-03f;
  near = near * s - 2.6853810995817184e-02f;
  near = near * s + 0.1128358542919159f;
  near = near * s - 0.3761262595653534f;
  near = near * s + 0.1283791065216064f;
  near = near * x + x;
  t = t > 4 ? spread(4.f) : t;  // 1 in single precision
  VF p = -2.1688603737857193e-05f + VF{};
  p = p * t + 4.413581918925047e-04f;
  p = p * t - 4.204675555229187e-03f;
  p = p * t + 2.5208579376339912e-02f;
  p = p * t - 0.10841911286115646f;
  p = p * t - 0.6332193613052368f;
  p = p * t - 1.129578709602356f;
  p = p * t + 1.881031203083694e-04f;
  return magnitude(x) < 1 ? near : with_sign_of(-expm1_below(p), x);
}
