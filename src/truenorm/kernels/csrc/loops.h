// The loops, for one instruction set; included after vectors.h in its namespace.
//
// Sums are taken in a fixed order: over a part of a channel, whose bounds depend on the shape alone,
// then over the parts. So no result depends on the number of threads. Eight values at most are
// added in float32, the rest in float64: what the eight lose, 2^-24 of themselves at random signs,
// vanishes among the many eights. Where squares overflow, or the shift was far from the mean, all
// is done again in float64.

constexpr int64_t PART = 1 << 16;   // values of a channel that are summed in one piece (planes)
constexpr int64_t BLOCK = 1024;     // columns that are worked on together (rows)
constexpr int64_t TILE = 512;       // values between which an activation is looked up
constexpr int64_t CHAIN = 8;        // vectors that are added up before they are widened
constexpr int64_t ABREAST = HALF == 2 ? 4 : 2;  // vectors of columns whose sums registers hold
constexpr int64_t SAMPLES = 8;

constexpr int64_t FAR = 1 << 21;  // values of which not all are in the caches
INLINE bool far(const Job& job) { return job.N * job.C * job.S >= FAR; }

// How far ahead of a value the processor is told what is read next: the same place of the next run,
// where runs are short and far; 0 where it sees so itself.
constexpr int64_t SHORT = 1024;
INLINE int64_t ahead_of(const Job& job) {
  return job.layout == Layout::planes && job.S <= SHORT && far(job) ? job.C * job.S : 0;
}

template <int64_t N>
struct Count {
  static constexpr int64_t value = N;
};

// What stands behind the affine map: nothing, a ReLU with or without an upper bound, or what is
// looked up for a tile of values.
enum Mode { PLAIN, RELU, TILED };

// The upper bound of a ReLU; NaN, than which nothing is larger, if it has none.
template <class A>
INLINE A bound_of(Act act) {
  return act == Act::relu6 ? A(6) : A(__builtin_nan(""));
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <class F>
INLINE void each(const Job& job, int64_t count, bool small, F f) {
  if (small || !job.parallel || job.threads == 1 || count == 1) {
    f(int64_t(0), count);
    end_of_stream();
    return;
  }
  job.parallel(count, &f, [](int64_t first, int64_t last, void* context) {
    (*(F*)context)(first, last);
    end_of_stream();
  });
}

// A parameter of the channel, read once, since what is stored might lie there for all the compiler
// knows; or of each column.
template <class A, bool COLUMNS>
struct Parameter {
  const A* p;
  vec<A> one;
  explicit INLINE Parameter(const A* p) : p(p), one(spread(COLUMNS ? A(0) : *p)) {}
  INLINE vec<A> at(int64_t i) const {
    if constexpr (COLUMNS) return load(p + i);
    return one;
  }
};

// (C,) arrays of a job in the type of its arithmetic, one entry a column where layout is rows.
template <class A>
struct Affine {
  A *mean, *scale, *offset;  // z = (x - mean) * scale + offset
  A *a, *b, *c;              // dx = a * dy + b * (x - mean) + c
};

template <bool STREAM, class T>
INLINE void put(T* p, vec<wide<T>> v) {
  if constexpr (STREAM) {
    stream(p, v);
  } else {
    store(p, v);
  }
}

template <bool FIRST, class A, class B>
struct Choice {
  typedef A type;
};
template <class A, class B>
struct Choice<false, A, B> {
  typedef B type;
};
template <bool FIRST, class A, class B>
using Either = typename Choice<FIRST, A, B>::type;

// Widens n values, of which a mask does not show some: those become `fill`.
template <class T, class A>
NOINLINE void cover(const T* from, const uint8_t* mask, A fill, A* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    A value = widen(from[i]);
    to[i] = mask[i] ? value : fill;
  }
}
// Copies n <= TILE values, with zeros where a mask does not show one; past the caches, if asked.
template <class T>
NOINLINE void put_shown(T* from, const uint8_t* mask, T* to, int64_t n, bool past) {
  typedef Either<sizeof(T) == 2, uint16_t, Either<sizeof(T) == 4, uint32_t, uint64_t>> B;
  B* bits = (B*)from;
  for (int64_t i = 0; i < n; ++i) bits[i] &= B(-B(mask[i]));
  int64_t i = 0;
  constexpr int64_t L = lanes<wide<T>>;
  if (past && aligned(to)) {
    for (; i + L <= n; i += L) stream(to + i, load(from + i));
  }
  __builtin_memcpy((void*)(to + i), from + i, size_t(n - i) * sizeof(T));
}

// ---- one run: n values that lie side by side, of one channel or of n columns -----------------

// What goes into the activation, of n <= TILE values, and zeros up to a whole vector.
template <class T, bool COLUMNS>
INLINE void before_activation(const T* x, const T* residual, wide<T>* z, int64_t n,
                              const wide<T>* mean, const wide<T>* scale, const wide<T>* offset) {
  typedef wide<T> A;
  constexpr int64_t L = lanes<A>;
  const Parameter<A, COLUMNS> m(mean), k(scale), o(offset);
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    vec<A> v = (load(x + i) - m.at(i)) * k.at(i) + o.at(i);
    if (residual) v += load(residual + i);
    store(z + i, v);
  }
  if (i == n) return;
  store(z + i, vec<A>{});
  for (; i < n; ++i) {
    int64_t j = COLUMNS ? i : 0;
    z[i] = (widen(x[i]) - mean[j]) * scale[j] + offset[j];
    if (residual) z[i] += widen(residual[i]);
  }
}

// n <= TILE values in the type of arithmetic, and zeros up to a whole vector.
template <class T>
INLINE void widen_tile(const T* from, wide<T>* to, int64_t n) {
  constexpr int64_t L = lanes<wide<T>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(to + i, load(from + i));
  if (i == n) return;
  store(to + i, vec<wide<T>>{});
  for (; i < n; ++i) to[i] = widen(from[i]);
}
template <class T>
INLINE void narrow_tile(const wide<T>* from, T* to, int64_t n) {
  constexpr int64_t L = lanes<wide<T>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = narrow<T>(from[i]);
}

template <class T, Mode MODE, bool RESIDUAL, bool COLUMNS>
INLINE void apply_run(const Job& job, const T* x, const T* residual, T* y, int64_t n, const wide<T>* mean, const wide<T>* scale,
                      const wide<T>* offset) {
  typedef wide<T> A;
  constexpr int64_t L = lanes<A>;
  if constexpr (MODE == TILED) {
    A tile[TILE];
    for (int64_t at = 0; at < n; at += TILE) {
      int64_t size = least(TILE, n - at);
      int64_t to = COLUMNS ? at : 0;
      before_activation<T, COLUMNS>(x + at, RESIDUAL ? residual + at : nullptr, tile, size,
                                    mean + to, scale + to, offset + to);
      activate(job.act, tile, size);
      narrow_tile(tile, y + at, size);
    }
    return;
  }
  int64_t i = 0;
  const Parameter<A, COLUMNS> m(mean), k(scale), o(offset);
  const vec<A> high = spread(bound_of<A>(job.act));
  const int64_t ahead = ahead_of(job);
  auto loop = [&](auto streams) INLINE_LAMBDA {
    for (; i + L <= n; i += L) {
      if (ahead) {
        __builtin_prefetch(x + i + ahead);
        if constexpr (!decltype(streams)::value) __builtin_prefetch(y + i + ahead, 1);
      }
      vec<A> z = (load(x + i) - m.at(i)) * k.at(i) + o.at(i);
      if constexpr (RESIDUAL) z += load(residual + i);
      if constexpr (MODE == RELU) z = z < 0 ? vec<A>{} : (z > high ? high : z);  // NaN stays
      put<decltype(streams)::value>(y + i, z);
    }
  };
  if (job.stream && aligned(y)) {
    loop(Count<1>{});
  } else {
    loop(Count<0>{});
  }
  for (; i < n; ++i) {
    int64_t j = COLUMNS ? i : 0;
    A z = (widen(x[i]) - mean[j]) * scale[j] + offset[j];
    if constexpr (RESIDUAL) z += widen(residual[i]);
    if constexpr (MODE == RELU) z = z < 0 ? A(0) : z > high[0] ? high[0] : z;
    y[i] = narrow<T>(z);
  }
}

// The gradient in front of the activation of n <= TILE values, for TILED.
template <class T, bool COLUMNS>
INLINE void gradient_tile(const Job& job, const T* x, const T* residual, const T* out,
                          const T* dy, wide<T>* tile, int64_t n,
                          const wide<T>* mean, const wide<T>* scale, const wide<T>* offset) {
  typedef wide<T> A;
  A z[TILE];
  widen_tile(dy, tile, n);
  if (out) {
    widen_tile(out, z, n);
    slope_by_output(job.act, z, tile, n);
  } else if (job.act != Act::none) {
    before_activation<T, COLUMNS>(x, residual, z, n, mean, scale, offset);
    slope_by_input(job.act, z, tile, n);
  }
}

// The gradient in front of a ReLU: by the output, if that is known, else by what went into it.
template <class T, Mode MODE, bool OUTPUT, bool COLUMNS>
INLINE vec<wide<T>> gradient_at(const T* x, const T* out, const T* dy, int64_t i,
                                const Parameter<wide<T>, COLUMNS>& mean,
                                const Parameter<wide<T>, COLUMNS>& scale,
                                const Parameter<wide<T>, COLUMNS>& offset, vec<wide<T>> high) {
  typedef wide<T> A;
  vec<A> g = held(load(dy + i));
  if constexpr (MODE == RELU) {
    vec<A> z;
    if constexpr (OUTPUT) {
      z = load(out + i);
    } else {
      z = (load(x + i) - mean.at(i)) * scale.at(i) + offset.at(i);
    }
    // As torch: where the output is NaN the gradient passes.
    g = held((z <= 0) | (z >= high) ? vec<A>{} : g);
  }
  return g;
}
template <class T, Mode MODE, bool OUTPUT, bool COLUMNS>
INLINE wide<T> gradient_of_one(const T* x, const T* out, const T* dy, int64_t i,
                               const wide<T>* mean, const wide<T>* scale, const wide<T>* offset,
                               wide<T> high) {
  typedef wide<T> A;
  A g = widen(dy[i]);
  if constexpr (MODE == RELU) {
    int64_t j = COLUMNS ? i : 0;
    A z = OUTPUT ? widen(out[i]) : (widen(x[i]) - mean[j]) * scale[j] + offset[j];
    g = z <= 0 || z >= high ? A(0) : g;
  }
  return g;
}

template <class T, Mode MODE, bool OUTPUT, bool COLUMNS>
INLINE void gradient_run(const Job& job, const T* x, const T* residual, const T* out,
                         const T* dy, const T* kept, T* dx, T* dresidual,
                         int64_t n, const Affine<wide<T>>& p, int64_t at) {
  typedef wide<T> A;
  constexpr int64_t L = lanes<A>;
  const A *mean = p.mean + at, *scale = p.scale + at, *offset = p.offset + at;
  const A *a = p.a + at, *b = p.b + at, *c = p.c + at;
  if constexpr (MODE == TILED) {
    A tile[TILE];
    for (int64_t to = 0; to < n; to += TILE) {
      int64_t size = least(TILE, n - to), k = COLUMNS ? to : 0;
      if (kept) {
        widen_tile(kept + to, tile, size);
      } else {
        gradient_tile<T, COLUMNS>(job, x + to, residual ? residual + to : nullptr,
                                  out ? out + to : nullptr, dy + to, tile, size, mean + k, scale + k, offset + k);
      }
      if (dresidual && dresidual != kept) narrow_tile(tile, dresidual + to, size);
      if (!dx) continue;
      const Parameter<A, COLUMNS> m(mean + k), pa(a + k), pb(b + k), pc(c + k);
      int64_t i = 0;
      for (; i + L <= size; i += L) {
        vec<A> d = load(x + to + i) - m.at(i);
        store(dx + to + i, pa.at(i) * load(tile + i) + (pb.at(i) * d + pc.at(i)));
      }
      for (; i < size; ++i) {
        int64_t j = COLUMNS ? k + i : 0;
        A value = a[j] * tile[i] + (b[j] * (widen(x[to + i]) - mean[j]) + c[j]);
        dx[to + i] = narrow<T>(value);
      }
    }
    return;
  }
  int64_t i = 0;
  const Parameter<A, COLUMNS> m(mean), k(scale), o(offset), pa(a), pb(b), pc(c);
  const vec<A> high = spread(bound_of<A>(job.act));
  const int64_t ahead = ahead_of(job);
  auto loop = [&](auto with_dx, auto with_residual, auto streams) INLINE_LAMBDA {
    constexpr bool STREAM = decltype(streams)::value;
    for (; i + L <= n; i += L) {
      if (ahead) {
        __builtin_prefetch(x + i + ahead);
        __builtin_prefetch(dy + i + ahead);
        if constexpr (decltype(with_dx)::value && !STREAM) __builtin_prefetch(dx + i + ahead, 1);
      }
      vec<A> g = gradient_at<T, MODE, OUTPUT, COLUMNS>(x, out, dy, i, m, k, o, high);
      if constexpr (decltype(with_residual)::value) put<STREAM>(dresidual + i, g);
      if constexpr (decltype(with_dx)::value) {
        put<STREAM>(dx + i, pa.at(i) * g + (pb.at(i) * (load(x + i) - m.at(i)) + pc.at(i)));
      }
    }
  };
  if (!dx) {
    loop(Count<0>{}, Count<1>{}, Count<0>{});
  } else if (job.stream && aligned(dx) && (!dresidual || aligned(dresidual))) {
    dresidual ? loop(Count<1>{}, Count<1>{}, Count<1>{}) : loop(Count<1>{}, Count<0>{}, Count<1>{});
  } else {
    dresidual ? loop(Count<1>{}, Count<1>{}, Count<0>{}) : loop(Count<1>{}, Count<0>{}, Count<0>{});
  }
  for (; i < n; ++i) {
    int64_t j = COLUMNS ? i : 0;
    A g = gradient_of_one<T, MODE, OUTPUT, COLUMNS>(x, out, dy, i, mean, scale, offset, high[0]);
    if (dresidual) dresidual[i] = narrow<T>(g);
    if (dx) dx[i] = narrow<T>(a[j] * g + (b[j] * (widen(x[i]) - mean[j]) + c[j]));
  }
}

// ---- sums --------------------------------------------------------------------------------------

struct Sums {
  VD first[2] = {}, second[2] = {}, third[2] = {};
  double first1 = 0, second1 = 0, third1 = 0;  // of what fills no vector
};

INLINE void widen_into(VD* sums, VF v) {
  sums[0] += lower(v);
  sums[1] += upper(v);
}
INLINE void widen_into(VD* sums, VD v) { sums[0] += v; }
INLINE void widen_onto(double* sums, VF v) {
  store(sums, load(sums) + lower(v));
  store(sums + LD, load(sums + LD) + upper(v));
}
INLINE void widen_onto(double* sums, VD v) { store(sums, load(sums) + v); }

// `count` vectors of x - shift, and their squares, added up.
template <int64_t count, class T>
INLINE void moments_chain(const T* x, VF by, int64_t ahead, Sums& sums) {
  VF s{}, q{};
  for (int64_t k = 0; k < count; ++k) {
    if (ahead) __builtin_prefetch(x + k * LF + ahead);
    VF d = load(x + k * LF) - by;
    s += d;
    q += d * d;
  }
  widen_into(sums.first, s);
  widen_into(sums.second, q);
}

// sum += value, and what rounding lost of it to `lost` (Knuth's two-sum): float64 has nothing wider.
template <class V>
INLINE void add_exactly(V& sum, V& lost, V value) {
  V now = sum + value, added = now - sum;
  lost += (sum - (now - added)) + (value - added);
  sum = now;
}
template <class V>
INLINE V only_finite(V v) {
  return v - v == 0 ? v : V{};
}

// Sums of x - shift and its square, of one run of a channel.
template <class T, bool EXACT>
INLINE void moments_run(const T* x, int64_t n, double shift, int64_t ahead, Sums& sums) {
  int64_t i = 0;
  if constexpr (!EXACT) {
    VF by = spread(float(shift));
    Sums own = sums;
    for (; i + CHAIN * LF <= n; i += CHAIN * LF) moments_chain<CHAIN>(x + i, by, ahead, own);
    for (; i + LF <= n; i += LF) moments_chain<1>(x + i, by, ahead, own);
    sums = own;
  }
  VD by = spread(shift);
  if constexpr (sizeof(T) == 8) {
    VD s{}, lost{}, q{}, lost_of_q{};
    for (; i + LD <= n; i += LD) {
      VD d = load_double(x + i) - by;
      add_exactly(s, lost, d);
      add_exactly(q, lost_of_q, d * d);
    }
    sums.first[0] += s, sums.first[1] += only_finite(lost);
    sums.second[0] += q, sums.second[1] += only_finite(lost_of_q);
  }
  for (; i + LD <= n; i += LD) {
    VD d = load_double(x + i) - by;
    sums.first[0] += d;
    sums.second[0] += d * d;
  }
  for (; i < n; ++i) {
    double d = double(widen(x[i])) - shift;
    sums.first1 += d;
    sums.second1 += d * d;
  }
}

// Sums of the gradient g in front of the activation, of g * (x - mean), and of x - mean; what is not
// cheaper found again, TILED and by OUTPUT, also writes g to `kept`, if that is given.
template <class T, Mode MODE, bool OUTPUT>
INLINE void sums_run(const Job& job, const T* x, const T* residual, const T* out,
                     const T* dy, T* kept, int64_t n, const wide<T>* mean,
                     const wide<T>* scale, const wide<T>* offset, Sums& sums) {
  typedef wide<T> A;
  constexpr int64_t L = lanes<A>;
  const T* from = x;
  const int64_t ahead = ahead_of(job);
  const Parameter<A, false> m(mean), ks(scale), o(offset);
  const vec<A> high = spread(bound_of<A>(job.act));
  Sums own = sums;  // in registers
  // Of `size` values of x, whose gradients gradient(i) and, one of them, gradient_one(i) give.
  auto add = [&](const T* x, int64_t size, auto gradient, auto gradient_one) INLINE_LAMBDA {
    int64_t i = 0;
    auto chain = [&](auto count) INLINE_LAMBDA {
      vec<A> s{}, q{}, t{};
      for (int64_t k = 0; k < decltype(count)::value; ++k) {
        if (ahead) {
          __builtin_prefetch(x + i + k * L + ahead);
          __builtin_prefetch(dy + (x - from) + i + k * L + ahead);
        }
        vec<A> g = gradient(i + k * L), d = load(x + i + k * L) - m.at(i);
        s += g, q += g * d, t += d;
      }
      widen_into(own.first, s);
      widen_into(own.second, q);
      widen_into(own.third, t);
    };
    constexpr int64_t count = sizeof(A) == 8 ? 2 : CHAIN;
    for (; i + count * L <= size; i += count * L) chain(Count<count>{});
    for (; i + L <= size; i += L) chain(Count<1>{});
    for (; i < size; ++i) {
      double g = gradient_one(i), d = widen(x[i]) - *mean;
      own.first1 += g;
      own.second1 += g * d;
      own.third1 += d;
    }
  };
  if constexpr (MODE == TILED) {
    A tile[TILE];
    for (int64_t to = 0; to < n; to += TILE) {
      int64_t size = least(TILE, n - to);
      gradient_tile<T, false>(job, x + to, residual ? residual + to : nullptr,
                              out ? out + to : nullptr, dy + to, tile, size, mean, scale, offset);
      if (kept) narrow_tile(tile, kept + to, size);
      add(
          x + to, size, [&](int64_t i) INLINE_LAMBDA { return load(tile + i); },
          [&](int64_t i) INLINE_LAMBDA { return tile[i]; });
    }
  } else {
    add(
        x, n,
        [&](int64_t i) INLINE_LAMBDA {
          vec<A> g = gradient_at<T, MODE, OUTPUT, false>(x, out, dy, i, m, ks, o, high);
          if (OUTPUT && kept) store(kept + i, g);
          return g;
        },
        [&](int64_t i) INLINE_LAMBDA {
          A g = gradient_of_one<T, MODE, OUTPUT, false>(x, out, dy, i, mean, scale, offset, high[0]);
          if (OUTPUT && kept) kept[i] = narrow<T>(g);
          return g;
        });
  }
  sums = own;
}

// Where sums of CHAIN rows begin and end: what is between waits in the nearest cache.
enum Stage { WHOLE, BEGIN, MIDDLE, END };

// Sums of `rows` rows more, of one vector of columns.
template <Stage STAGE, class A>
struct Waiting {
  vec<A> sum;
  explicit INLINE Waiting(const A* at)
      : sum(STAGE == WHOLE || STAGE == BEGIN ? vec<A>{} : load(at)) {}
  INLINE void keep(A* at, double* total) const {
    if constexpr (STAGE == WHOLE || STAGE == END) {
      widen_onto(total, sum);
    } else {
      store(at, sum);
    }
  }
};

// CHAIN rows after CHAIN rows, along their columns, as memory is read fastest: f(row, column, rows,
// vectors, stage) for all whole vectors of L of `n` columns in rows [r0, r1). Rows that registers
// can hold the sums of are taken together, of wider ones two; but one after the other if they lie
// far: memory is read fastest in its own order.
template <int64_t L, class F>
INLINE void along_rows(int64_t r0, int64_t r1, int64_t n, bool far, F f) {
  auto along = [&](int64_t row, auto rows, auto stage) INLINE_LAMBDA {
    int64_t i = 0;
    for (; i + ABREAST * L <= n; i += ABREAST * L) f(row, i, rows, Count<ABREAST>{}, stage);
    for (; i + L <= n; i += L) f(row, i, rows, Count<1>{}, stage);
  };
  auto in_turn = [&](int64_t row, auto rows) INLINE_LAMBDA {
    constexpr int64_t R = decltype(rows)::value;
    along(row, rows, Count<BEGIN>{});
    for (int64_t k = R; k < CHAIN - R; k += R) along(row + k, rows, Count<MIDDLE>{});
    along(row + CHAIN - R, rows, Count<END>{});
  };
  int64_t r = r0;
  for (; r + CHAIN <= r1; r += CHAIN) {
    if (far) {
      in_turn(r, Count<1>{});
    } else if (n <= ABREAST * L || L == LD) {
      along(r, Count<CHAIN>{}, Count<WHOLE>{});
    } else {
      in_turn(r, Count<2>{});
    }
  }
  for (; r < r1; ++r) along(r, Count<1>{}, Count<WHOLE>{});
}

// Rows [r0, r1) of `n` columns, `stride` apart: sums of x - shift and its square, per column.
template <class T, bool EXACT>
NOINLINE void moments_rows(const T* x, int64_t r0, int64_t r1, int64_t stride, int64_t n,
                         const double* shift, const float* shift32, bool far,
                         double* first, double* second) {
  typedef wide<T> A;
  constexpr int64_t L = lanes<A>;
  int64_t i = 0;
  if constexpr (!EXACT || sizeof(A) == 8) {
    // What the rows give goes to `first` and `second`, which the nearest cache holds.
    A waiting[2][BLOCK];
    const A* by_column;
    if constexpr (sizeof(A) == 8) {
      by_column = shift;
    } else {
      by_column = shift32;
    }
    auto step = [&](int64_t row, int64_t column, auto rows, auto vectors,
                    auto stage) INLINE_LAMBDA {
      typedef Waiting<Stage(decltype(stage)::value), A> Sum;
      for (int64_t v = 0; v < decltype(vectors)::value; ++v) {
        int64_t at = column + v * L;
        vec<A> by = load(by_column + at);
        Sum s(waiting[0] + at), q(waiting[1] + at);
        for (int64_t k = 0; k < decltype(rows)::value; ++k) {
          vec<A> d = load(x + (row + k) * stride + at) - by;
          s.sum += d;
          q.sum += d * d;
        }
        s.keep(waiting[0] + at, first + at);
        q.keep(waiting[1] + at, second + at);
      }
    };
    along_rows<L>(r0, r1, n, far, step);
    i = n / L * L;
  }
  for (int64_t r = r0; r < r1; ++r) {
    const T* row = x + r * stride;
    int64_t j = i;
    for (; j + LD <= n; j += LD) {
      VD d = load_double(row + j) - load(shift + j);
      store(first + j, load(first + j) + d);
      store(second + j, load(second + j) + d * d);
    }
    for (; j < n; ++j) {
      double d = double(widen(row[j])) - shift[j];
      first[j] += d;
      second[j] += d * d;
    }
  }
}

template <class T, Mode MODE, bool OUTPUT>
NOINLINE void sums_rows(const Job& job, const T* x, const T* residual, const T* out, const T* dy,
                      T* kept, int64_t r0, int64_t r1, int64_t stride, int64_t n, const wide<T>* mean,
                      const wide<T>* scale, const wide<T>* offset, double* first, double* second,
                      double* third) {
  typedef wide<T> A;
  int64_t r = r0;
  if constexpr (MODE == TILED) {
    A tile[TILE];
    for (; r < r1; ++r) {
      for (int64_t to = 0; to < n; to += TILE) {
        int64_t size = least(TILE, n - to), at = r * stride + to;
        gradient_tile<T, true>(job, x + at, residual ? residual + at : nullptr,
                               out ? out + at : nullptr, dy + at, tile, size, mean + to,
                               scale + to, offset + to);
        if (kept) narrow_tile(tile, kept + at, size);
        constexpr int64_t L = lanes<A>;
        int64_t i = 0;
        for (; i + L <= size; i += L) {
          vec<A> g = load(tile + i), d = load(x + at + i) - load(mean + to + i);
          widen_onto(first + to + i, g);
          widen_onto(second + to + i, g * d);
          widen_onto(third + to + i, d);
        }
        for (; i < size; ++i) {
          double g = tile[i], d = widen(x[at + i]) - mean[to + i];
          first[to + i] += g;
          second[to + i] += g * d;
          third[to + i] += d;
        }
      }
    }
    return;
  }
  constexpr int64_t L = lanes<A>;
  const Parameter<A, true> m(mean), ks(scale), o(offset);
  const vec<A> high = spread(bound_of<A>(job.act));
  A waiting[3][BLOCK];
  auto step = [&](int64_t row, int64_t column, auto rows, auto vectors, auto stage) INLINE_LAMBDA {
    typedef Waiting<Stage(decltype(stage)::value), A> Sum;
    for (int64_t v = 0; v < decltype(vectors)::value; ++v) {
      int64_t i = column + v * L;
      Sum s(waiting[0] + i), q(waiting[1] + i), t(waiting[2] + i);
      for (int64_t k = 0; k < decltype(rows)::value; ++k) {
        int64_t at = (row + k) * stride;
        vec<A> g = gradient_at<T, MODE, OUTPUT, true>(x + at, OUTPUT ? out + at : out, dy + at, i,
                                                      m, ks, o, high);
        vec<A> d = load(x + at + i) - m.at(i);
        if (OUTPUT && kept) store(kept + at + i, g);
        s.sum += g, q.sum += g * d, t.sum += d;
      }
      s.keep(waiting[0] + i, first + i);
      q.keep(waiting[1] + i, second + i);
      t.keep(waiting[2] + i, third + i);
    }
  };
  along_rows<L>(r, r1, n, far(job), step);
  for (int64_t i = n / L * L; i < n; ++i) {
    for (int64_t row = r0; row < r1; ++row) {
      int64_t j = row * stride;
      A one = gradient_of_one<T, MODE, OUTPUT, true>(x + j, OUTPUT ? out + j : out, dy + j, i,
                                                     mean, scale, offset, high[0]);
      if (OUTPUT && kept) kept[j + i] = narrow<T>(one);
      double g = one;
      double d = widen(x[j + i]) - mean[i];
      first[i] += g;
      second[i] += g * d;
      third[i] += d;
    }
  }
}
