// How a job is cut into pieces and its pieces put together; after loops.h in its namespace.

struct Arena {  // doubles, freed at the end of a call
  double* at;
  explicit Arena(int64_t count) : at((double*)__builtin_malloc(size_t(count + 8) * 8)) {}
  ~Arena() { __builtin_free(at); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
};

// The pieces of a job: `parts` of each of `blocks` of channels.
struct Pieces {
  int64_t blocks, parts;
  int64_t width;  // channels of a block
  int64_t size;   // planes: values of a channel in a part. rows: rows in a part
  bool small;

  explicit Pieces(const Job& job) {
    small = job.N * job.C * job.S <= SMALL;
    if (job.layout == Layout::planes) {
      width = 1;
      blocks = job.C;
      size = PART;
      parts = most(1, (job.N * job.S + PART - 1) / PART);
      return;
    }
    width = most(1, BLOCK / job.S);
    blocks = (job.C + width - 1) / width;
    int64_t columns = least(width, job.C) * job.S;
    // Few enough that what each costs beside its values is little, enough for many threads.
    size = most(PART / columns, (job.N + 31) / 32);
    size = most(CHAIN, size / CHAIN * CHAIN);
    parts = most(1, (job.N + size - 1) / size);
  }
};

template <class T>
struct Drive {
  typedef wide<T> A;
  Job& job;
  Pieces pieces;
  const T *x, *residual, *out, *dy;
  T *y, *dx, *dresidual;
  T* kept = nullptr;  // the gradient in front of the activation, between the sweeps
  Arena arena;
  Affine<A> affine;
  double *shift, *first, *second, *third;  // of channels, and of parts of channels

  explicit Drive(Job& job)
      : job(job), pieces(job), x((const T*)job.x), residual((const T*)job.residual),
        out((const T*)job.out), dy((const T*)job.dy), y((T*)job.y), dx((T*)job.dx),
        dresidual((T*)job.dresidual), arena(job.C * (7 + 3 * pieces.parts)) {
    double* at = arena.at;
    shift = at;
    first = at += job.C;
    second = at += job.C * pieces.parts;
    third = at += job.C * pieces.parts;
    at += job.C * pieces.parts;
    A* p = (A*)at;
    affine = {p, p + job.C, p + 2 * job.C, p + 3 * job.C, p + 4 * job.C, p + 5 * job.C};
  }

  // Stretches of `length` values or rows, from the place `from` of the mask, that are all shown or
  // all not: f(from, length, shown).
  template <class F>
  INLINE void stretches(int64_t from, int64_t length, F f) const {
    if (!job.mask) return f(from, length, true);
    for (int64_t end = from + length; from < end;) {
      bool shown = job.mask[from];
      uint64_t eight, same = shown ? 0x0101010101010101 : 0;
      int64_t to = from + 1;
      for (; to + 8 <= end; to += 8) {
        __builtin_memcpy(&eight, job.mask + to, 8);
        if (eight != same) break;
      }
      while (to < end && bool(job.mask[to]) == shown) ++to;
      f(from, to - from, shown);
      from = to;
    }
  }

  // Runs of channel c in part p, cut where the mask changes: f(offset, length, shown).
  template <class F>
  INLINE void runs(int64_t c, int64_t part, F f) const {
    int64_t at = part * pieces.size, end = least(at + pieces.size, job.N * job.S);
    while (at < end) {
      int64_t n = at / job.S, s = at % job.S, length = least(job.S - s, end - at);
      stretches(at, length, [&](int64_t from, int64_t size, bool shown) INLINE_LAMBDA {
        f((n * job.C + c) * job.S + s + from - at, size, shown);
      });
      at += length;
    }
  }

  // The mean of a few values, far apart, whose number is a power of two: equal ones give
  // themselves.
  INLINE void choose_shifts(int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; ++c) shift[c] = 0;
    for (int64_t k = 0; k < SAMPLES; ++k) {
      int64_t i = job.N * job.S * k / SAMPLES, n = i / job.S, s = i % job.S;
      const T* from = x + n * job.C * job.S + s;
      for (int64_t c = c0; c < c1; ++c) shift[c] += widen(from[c * job.S]);
    }
    for (int64_t c = c0; c < c1; ++c) {
      double mean = shift[c] / SAMPLES;
      shift[c] = mean - mean == 0 ? double(A(mean)) : 0;
    }
  }

  // The parts of a block's sums, in their order, are added to its first.
  INLINE void add_parts(double* sums, int64_t block) const {
    for (int64_t p = 1; p < pieces.parts; ++p) {
      for (int64_t c = begin(block); c < end(block); ++c) sums[c] += sums[p * job.C + c];
    }
  }

  // Channel c, of parts that have been added: job.mean and job.var.
  INLINE bool join(int64_t c) {
    double s = first[c], q = second[c];
    double count = double(job.count), off = s / count, var = q / count - off * off;
    job.mean[c] = shift[c] + off;
    job.var[c] = var > 0 || var != var ? var : 0;
    // What cancelled between q and off is lost; of float64 nothing may be.
    double most = AT_ONCE ? 0x1p-40 : 16;
    if (off * off <= most * job.var[c] && var - var == 0) return true;
    double to = job.mean[c];
    if (to - to == 0) shift[c] = to;
    return off == 0 && var == 0;
  }

  // r and d of channel c: those that make of its values what the running statistics would.
  INLINE void renormalize(int64_t c) {
    double std = __builtin_sqrt(job.running_var[c] + job.eps);
    double r = __builtin_sqrt(job.var[c] + job.eps) / std, d = (job.mean[c] - job.running_mean[c]) / std;
    job.r[c] = r > job.rmax ? job.rmax : r < 1 / job.rmax ? 1 / job.rmax : r;
    job.d[c] = d > job.dmax ? job.dmax : d < -job.dmax ? -job.dmax : d;
  }

  INLINE void prepare(int64_t c) {
    double k = 1 / __builtin_sqrt(job.var[c] + job.eps), o = 0;
    A m = A(job.mean[c]);
    double off = double(m) - job.mean[c];
    off = off - off == 0 ? off * k : 0;
    if (job.running_mean) renormalize(c);
    if (job.r) {
      k *= job.r[c];
      off = off * job.r[c] + job.d[c];
    }
    double w = job.weight ? job.weight[c] : 1;
    o = off * w + (job.bias ? job.bias[c] : 0);
    affine.mean[c] = m;
    affine.scale[c] = A(k * w);
    affine.offset[c] = A(o);
  }

  // dx of channel c: a * dy + b * (x - mean) + c.
  INLINE void prepare_gradient(int64_t c) {
    double inverse = 1 / __builtin_sqrt(job.var[c] + job.eps);
    double k = inverse * (job.weight ? job.weight[c] : 1) * (job.r ? job.r[c] : 1);
    affine.a[c] = A(k);
    if (!job.train) {
      affine.b[c] = affine.c[c] = 0;
      return;
    }
    double count = double(job.count), slip = double(affine.mean[c]);
    slip = job.mean[c] - slip;  // x - affine.mean has this mean
    slip = slip - slip == 0 ? slip : 0;
    double b = -k * inverse * inverse * job.product[c] / count;
    affine.b[c] = A(b);
    affine.c[c] = A(-k * job.sum[c] / count - b * slip);
  }

  INLINE void join_sums(int64_t c) {
    double s = first[c], q = second[c], t = third[c];
    // Taken about affine.mean, which is job.mean rounded, or the mean given, which may be too.
    double at = affine.mean[c];
    if (job.train) {
      double slip = t / double(job.count);
      if (slip - slip == 0) job.mean[c] = at + slip;
    }
    job.sum[c] = s;
    job.product[c] = q - (job.mean[c] - at) * s;
  }

  // ---- pieces, of planes and of rows

  template <bool EXACT>
  INLINE void moments_piece(int64_t block, int64_t part) {
    if (job.layout == Layout::planes) {
      Sums sums;
      runs(block, part, [&](int64_t at, int64_t n, bool shown) INLINE_LAMBDA {
        if (shown) moments_run<T, EXACT>(x + at, n, shift[block], ahead_of(job), sums);
      });
      first[part * job.C + block] = total(sums.first[0] + sums.first[1]) + sums.first1;
      second[part * job.C + block] = total(sums.second[0] + sums.second[1]) + sums.second1;
      return;
    }
    int64_t c0 = block * pieces.width, c1 = least(c0 + pieces.width, job.C), S = job.S;
    int64_t n = (c1 - c0) * S;
    double by[BLOCK], s[BLOCK], q[BLOCK];
    float by32[BLOCK];
    expand(shift, c0, c1, by);
    for (int64_t i = 0; i < n; ++i) {
      s[i] = q[i] = 0;
      by32[i] = float(by[i]);
    }
    int64_t r0 = part * pieces.size, r1 = least(r0 + pieces.size, job.N);
    stretches(r0, r1 - r0, [&](int64_t row, int64_t rows, bool shown) INLINE_LAMBDA {
      if (!shown) return;
      moments_rows<T, EXACT>(x + c0 * S, row, row + rows, job.C * S, n, by, by32, far(job), s, q);
    });
    gather(c0, c1, part, s, first);
    gather(c0, c1, part, q, second);
  }

  INLINE void gather(int64_t c0, int64_t c1, int64_t part, const double* columns, double* to) {
    if (job.S == 1) {
      __builtin_memcpy(to + part * job.C + c0, columns, size_t(c1 - c0) * sizeof(double));
      return;
    }
    for (int64_t c = c0; c < c1; ++c) {
      double sum = 0;
      for (int64_t k = 0; k < job.S; ++k) sum += columns[(c - c0) * job.S + k];
      to[part * job.C + c] = sum;
    }
  }

  // Channel parameters p, one a column of channels [c0, c1), `times` over.
  template <class V>
  INLINE void expand(const V* p, int64_t c0, int64_t c1, V* to, int64_t times = 1) const {
    int64_t n = (c1 - c0) * job.S;
    for (int64_t c = c0; job.S > 1 && c < c1; ++c) {
      for (int64_t k = 0; k < job.S; ++k) to[(c - c0) * job.S + k] = p[c];
    }
    if (job.S == 1) __builtin_memcpy(to, p + c0, size_t(n) * sizeof(V));
    for (int64_t k = 1; k < times; ++k) __builtin_memcpy(to + k * n, to, size_t(n) * sizeof(V));
  }
  // How many rows of n columns are worked on as one run: they lie behind each other where one
  // block has all channels.
  INLINE int64_t together(int64_t n, int64_t rows) const {
    return pieces.blocks > 1 || job.mask ? 1 : most(1, least(BLOCK / n, rows));
  }

  // n values of channel c that lie side by side; zero where they are not shown.
  template <Mode MODE, bool RESIDUAL>
  INLINE void apply_stretch(int64_t c, int64_t at, int64_t n, bool shown) {
    if (!shown) {
      __builtin_memset((void*)(y + at), 0, size_t(n) * sizeof(T));
      return;
    }
    apply_run<T, MODE, RESIDUAL, false>(job, x + at, residual + (RESIDUAL ? at : 0), y + at, n,
                                        affine.mean + c, affine.scale + c, affine.offset + c);
  }
  template <Mode MODE, bool OUTPUT>
  INLINE void gradient_stretch(int64_t c, int64_t at, int64_t n, bool shown) {
    if (!shown) {
      if (dx) __builtin_memset((void*)(dx + at), 0, size_t(n) * sizeof(T));
      if (dresidual) __builtin_memset((void*)(dresidual + at), 0, size_t(n) * sizeof(T));
      return;
    }
    gradient_run<T, MODE, OUTPUT, false>(
        job, x + at, residual ? residual + at : nullptr, out ? out + at : nullptr, dy + at,
        kept ? kept + at : nullptr, dx ? dx + at : nullptr, dresidual ? dresidual + at : nullptr, n,
        affine, c);
  }

  template <Mode MODE, bool RESIDUAL>
  INLINE void apply_piece(int64_t block, int64_t part) {
    if (job.layout == Layout::planes) {
      runs(block, part, [&](int64_t at, int64_t n, bool shown) INLINE_LAMBDA {
        apply_stretch<MODE, RESIDUAL>(block, at, n, shown);
      });
      return;
    }
    int64_t c0 = block * pieces.width, c1 = least(c0 + pieces.width, job.C), S = job.S;
    int64_t n = (c1 - c0) * S;
    A m[BLOCK], k[BLOCK], o[BLOCK];
    int64_t r0 = part * pieces.size, r1 = least(r0 + pieces.size, job.N);
    int64_t step = together(n, r1 - r0);
    expand(affine.mean, c0, c1, m, step);
    expand(affine.scale, c0, c1, k, step);
    expand(affine.offset, c0, c1, o, step);
    for (int64_t r = r0; r < r1; r += step) {
      int64_t at = (r * job.C + c0) * S;
      if (job.mask && !job.mask[r]) {
        __builtin_memset((void*)(y + at), 0, size_t(n) * sizeof(T));
        continue;
      }
      apply_run<T, MODE, RESIDUAL, true>(job, x + at, residual + (RESIDUAL ? at : 0), y + at,
                                         n * least(step, r1 - r), m, k, o);
    }
  }

  template <Mode MODE, bool OUTPUT>
  INLINE void sums_piece(int64_t block, int64_t part) {
    if (job.layout == Layout::planes) {
      Sums sums;
      runs(block, part, [&](int64_t at, int64_t n, bool shown) INLINE_LAMBDA {
        if (!shown) return;
        sums_run<T, MODE, OUTPUT>(job, x + at, residual ? residual + at : nullptr,
                                  out ? out + at : nullptr, dy + at, kept ? kept + at : nullptr, n, affine.mean + block,
                                  affine.scale + block, affine.offset + block, sums);
      });
      int64_t to = part * job.C + block;
      first[to] = total(sums.first[0] + sums.first[1]) + sums.first1;
      second[to] = total(sums.second[0] + sums.second[1]) + sums.second1;
      third[to] = total(sums.third[0] + sums.third[1]) + sums.third1;
      return;
    }
    int64_t c0 = block * pieces.width, c1 = least(c0 + pieces.width, job.C), S = job.S;
    int64_t n = (c1 - c0) * S, r0 = part * pieces.size, r1 = least(r0 + pieces.size, job.N);
    A m[BLOCK], k[BLOCK], o[BLOCK];
    double s[BLOCK], q[BLOCK], t[BLOCK];
    for (int64_t i = 0; i < n; ++i) s[i] = q[i] = t[i] = 0;
    expand(affine.mean, c0, c1, m);
    expand(affine.scale, c0, c1, k);
    expand(affine.offset, c0, c1, o);
    int64_t at = c0 * S;
    stretches(r0, r1 - r0, [&](int64_t row, int64_t rows, bool shown) INLINE_LAMBDA {
      if (!shown) return;
      sums_rows<T, MODE, OUTPUT>(job, x + at, residual ? residual + at : nullptr,
                                 out ? out + at : nullptr, dy + at, kept ? kept + at : nullptr,
                                 row, row + rows, job.C * S, n, m, k, o, s, q, t);
    });
    gather(c0, c1, part, s, first);
    gather(c0, c1, part, q, second);
    gather(c0, c1, part, t, third);
  }

  template <Mode MODE, bool OUTPUT>
  INLINE void gradient_piece(int64_t block, int64_t part) {
    if (job.layout == Layout::planes) {
      runs(block, part, [&](int64_t at, int64_t n, bool shown) INLINE_LAMBDA {
        gradient_stretch<MODE, OUTPUT>(block, at, n, shown);
      });
      return;
    }
    int64_t c0 = block * pieces.width, c1 = least(c0 + pieces.width, job.C), S = job.S;
    int64_t n = (c1 - c0) * S, r0 = part * pieces.size, r1 = least(r0 + pieces.size, job.N);
    A all[6][BLOCK];
    Affine<A> p = {all[0], all[1], all[2], all[3], all[4], all[5]};
    int64_t step = together(n, r1 - r0);
    expand(affine.mean, c0, c1, p.mean, step);
    expand(affine.scale, c0, c1, p.scale, step);
    expand(affine.offset, c0, c1, p.offset, step);
    expand(affine.a, c0, c1, p.a, step);
    expand(affine.b, c0, c1, p.b, step);
    expand(affine.c, c0, c1, p.c, step);
    for (int64_t r = r0; r < r1; r += step) {
      int64_t at = (r * job.C + c0) * S;
      if (job.mask && !job.mask[r]) {
        if (dx) __builtin_memset((void*)(dx + at), 0, size_t(n) * sizeof(T));
        if (dresidual) __builtin_memset((void*)(dresidual + at), 0, size_t(n) * sizeof(T));
        continue;
      }
      gradient_run<T, MODE, OUTPUT, true>(job, x + at, residual ? residual + at : nullptr,
                                          out ? out + at : nullptr, dy + at,
                                          kept ? kept + at : nullptr, dx ? dx + at : nullptr,
                                          dresidual ? dresidual + at : nullptr,
                                          n * least(step, r1 - r), p, 0);
    }
  }

  // ---- whole jobs

  // Whether a block's parts are better worked on one after the other, by one thread, from its cache.
  bool by_block() const { return pieces.parts == 1 || pieces.blocks >= 4 * job.threads; }

  INLINE int64_t begin(int64_t block) const { return block * pieces.width; }
  INLINE int64_t end(int64_t block) const { return least((block + 1) * pieces.width, job.C); }

  template <class F>
  INLINE void each_piece(F f) {
    each(job, pieces.blocks * pieces.parts, pieces.small, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) f(i / pieces.parts, i % pieces.parts);
    });
  }
  // Each run of planes in the order of memory, where nothing but the result is sought: f(run).
  template <class F>
  INLINE void each_run(F f) {
    int64_t runs = job.N * job.C;
    int64_t together = most(1, SMALL / most(1, job.S));
    each(job, (runs + together - 1) / together, pieces.small, [&](int64_t from, int64_t to) {
      for (int64_t run = from * together; run < least(to * together, runs); ++run) f(run);
    });
  }
  template <class F>
  INLINE void each_block(F f) {
    each(job, pieces.blocks, pieces.small, [&](int64_t from, int64_t to) {
      for (int64_t block = from; block < to; ++block) f(block);
    });
  }

  NOINLINE void find_moments(int64_t block) {
    choose_shifts(begin(block), end(block));
    for (int64_t p = 0; p < pieces.parts; ++p) moments_one<AT_ONCE>(block, p);
    for (int64_t tries = 0; !joined(block) && tries < 2; ++tries) {
      for (int64_t p = 0; p < pieces.parts; ++p) moments_one<true>(block, p);
    }
  }
  INLINE bool joined(int64_t block) {
    bool good = true;
    add_parts(first, block);
    add_parts(second, block);
    for (int64_t c = begin(block); c < end(block); ++c) good &= join(c);
    return good;
  }

  void moments() {
    if (!job.count) {
      for (int64_t c = 0; c < job.C; ++c) job.mean[c] = job.var[c] = 0;
      return;
    }
    if (by_block()) {
      each_block([&](int64_t block) { find_moments(block); });
      return;
    }
    choose_shifts(0, job.C);
    each_piece([&](int64_t block, int64_t part) { moments_one<AT_ONCE>(block, part); });
    for (int64_t tries = 0; tries < 2; ++tries) {
      bool good = true;
      for (int64_t block = 0; block < pieces.blocks; ++block) good &= joined(block);
      if (good) return;
      each_piece([&](int64_t block, int64_t part) { moments_one<true>(block, part); });
    }
    for (int64_t block = 0; block < pieces.blocks; ++block) joined(block);
  }
  static constexpr bool AT_ONCE = sizeof(T) == 8;  // float64 values are summed exactly at once
  template <bool EXACT>
  NOINLINE void moments_one(int64_t block, int64_t part) {
    moments_piece<EXACT>(block, part);
  }

  template <Mode MODE, bool RESIDUAL>
  NOINLINE void apply_one(int64_t block, int64_t part) {
    apply_piece<MODE, RESIDUAL>(block, part);
  }

  template <Mode MODE, bool RESIDUAL>
  void forward() {
    if (!job.train || !by_block() || !job.count) {
      if (job.train) moments();
      for (int64_t c = 0; c < job.C; ++c) prepare(c);
      if (job.layout == Layout::planes) {
        each_run([&](int64_t run) { apply_of<MODE, RESIDUAL>(run); });
      } else {
        each_piece([&](int64_t block, int64_t part) { apply_one<MODE, RESIDUAL>(block, part); });
      }
      return;
    }
    each_block([&](int64_t block) {
      find_moments(block);
      for (int64_t c = begin(block); c < end(block); ++c) prepare(c);
      for (int64_t p = 0; p < pieces.parts; ++p) apply_one<MODE, RESIDUAL>(block, p);
    });
  }

  template <Mode MODE, bool RESIDUAL>
  NOINLINE void apply_of(int64_t run) {
    int64_t c = run % job.C, at = run * job.S;
    stretches(run / job.C * job.S, job.S, [&](int64_t from, int64_t n, bool shown) INLINE_LAMBDA {
      apply_stretch<MODE, RESIDUAL>(c, at + from - run / job.C * job.S, n, shown);
    });
  }
  template <Mode MODE, bool OUTPUT>
  NOINLINE void gradient_of(int64_t run) {
    int64_t c = run % job.C, at = run * job.S;
    stretches(run / job.C * job.S, job.S, [&](int64_t from, int64_t n, bool shown) INLINE_LAMBDA {
      gradient_stretch<MODE, OUTPUT>(c, at + from - run / job.C * job.S, n, shown);
    });
  }

  template <Mode MODE, bool OUTPUT>
  NOINLINE void sums_one(int64_t block, int64_t part) {
    sums_piece<MODE, OUTPUT>(block, part);
  }
  template <Mode MODE, bool OUTPUT>
  NOINLINE void gradient_one(int64_t block, int64_t part) {
    gradient_piece<MODE, OUTPUT>(block, part);
  }

  template <Mode MODE, bool OUTPUT>
  void backward(bool with_sums, bool with_gradient) {
    for (int64_t c = 0; c < job.C; ++c) prepare(c);
    // An activation's slope is computed once, where what it gives can be written without loss.
    bool keeps = MODE == TILED && with_sums && with_gradient && sizeof(T) == sizeof(A);
    kept = !keeps ? nullptr : dresidual ? dresidual : dx;
    auto after = [&](int64_t block) {
      if (with_sums) {
        add_parts(first, block);
        add_parts(second, block);
        add_parts(third, block);
      }
      for (int64_t c = begin(block); c < end(block); ++c) {
        if (with_sums) join_sums(c);
        if (with_gradient) prepare_gradient(c);
      }
    };
    if (with_sums && by_block()) {
      each_block([&](int64_t block) {
        for (int64_t p = 0; p < pieces.parts; ++p) sums_one<MODE, OUTPUT>(block, p);
        after(block);
        if (!with_gradient) return;
        for (int64_t p = 0; p < pieces.parts; ++p) gradient_one<MODE, OUTPUT>(block, p);
      });
      return;
    }
    if (with_sums) {
      each_piece([&](int64_t block, int64_t part) { sums_one<MODE, OUTPUT>(block, part); });
    }
    for (int64_t block = 0; block < pieces.blocks; ++block) after(block);
    if (with_gradient && job.layout == Layout::planes) {
      each_run([&](int64_t run) { gradient_of<MODE, OUTPUT>(run); });
    } else if (with_gradient) {
      each_piece([&](int64_t block, int64_t part) { gradient_one<MODE, OUTPUT>(block, part); });
    }
  }
};

INLINE Mode mode_of(const Job& job, bool relu_by_tile) {
  if (relu_by_tile) return TILED;
  if (job.act == Act::none) return PLAIN;
  return job.act == Act::relu || job.act == Act::relu6 ? RELU : TILED;
}

template <class T>
static void moments_of(Job& job) {
  Drive<T>(job).moments();
}
template <class T>
static void forward_of(Job& job) {
  Drive<T> drive(job);
  Mode mode = mode_of(job, false);
  if (job.residual) {
    mode == PLAIN  ? drive.template forward<PLAIN, true>()
    : mode == RELU ? drive.template forward<RELU, true>()
                   : drive.template forward<TILED, true>();
  } else {
    mode == PLAIN  ? drive.template forward<PLAIN, false>()
    : mode == RELU ? drive.template forward<RELU, false>()
                   : drive.template forward<TILED, false>();
  }
}
template <class T>
static void backward_by(Job& job, bool sums, bool gradient) {
  Drive<T> drive(job);
  Mode mode = mode_of(job, job.residual && !job.out);
  if (mode == PLAIN) return drive.template backward<PLAIN, false>(sums, gradient);
  if (mode == TILED) return drive.template backward<TILED, false>(sums, gradient);
  if (job.out) return drive.template backward<RELU, true>(sums, gradient);
  drive.template backward<RELU, false>(sums, gradient);
}

#define BY_DTYPE(CALL)                   \
  switch (job.dtype) {                   \
    case Dtype::f32: return CALL(float)  \
    case Dtype::f64: return CALL(double) \
    case Dtype::bf16: return CALL(bf16)  \
    case Dtype::f16: return CALL(f16)    \
  }
#define MOMENTS(T) moments_of<T>(job);
#define FORWARD(T) forward_of<T>(job);
#define SUMS(T) backward_by<T>(job, true, false);
#define BACKWARD(T) backward_by<T>(job, true, true);
#define GRADIENT(T) backward_by<T>(job, false, true);
static void moments(Job& job) { BY_DTYPE(MOMENTS) }
static void forward(Job& job) { BY_DTYPE(FORWARD) }
static void sums(Job& job) { BY_DTYPE(SUMS) }
static void backward(Job& job) { BY_DTYPE(BACKWARD) }
static void gradient(Job& job) { BY_DTYPE(GRADIENT) }
#undef BY_DTYPE
#undef MOMENTS
#undef FORWARD
#undef SUMS
#undef BACKWARD
#undef GRADIENT
