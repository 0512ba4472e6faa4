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
  Job cached;  // the same, of which nothing is written past the caches: what is written twice
  Pieces pieces;
  const T *x, *residual, *out, *dy;
  T *y, *dx, *dresidual;
  T* kept = nullptr;  // the gradient in front of the activation, between the sweeps
  Arena arena;
  Affine<A> affine;
  int64_t samples[SAMPLES];
  double *shift, *first, *second, *third;  // of channels, and of parts of channels

  explicit Drive(Job& job)
      : job(job), cached(job), pieces(job), x((const T*)job.x), residual((const T*)job.residual),
        out((const T*)job.out), dy((const T*)job.dy), y((T*)job.y), dx((T*)job.dx),
        dresidual((T*)job.dresidual), arena(job.C * (7 + 3 * pieces.parts)) {
    cached.stream = false;
    if (job.count) choose_samples();
    double* at = arena.at;
    shift = at;
    first = at += job.C;
    second = at += job.C * pieces.parts;
    third = at += job.C * pieces.parts;
    at += job.C * pieces.parts;
    A* p = (A*)at;
    affine = {p, p + job.C, p + 2 * job.C, p + 3 * job.C, p + 4 * job.C, p + 5 * job.C};
  }

  // What a mask shows of some values: nothing, all, or a part.
  enum Seen { HIDDEN, SHOWN, MIXED };
  static INLINE Seen seen(const uint8_t* mask, int64_t n) {
    uint8_t any = 0, all = 1;
    for (int64_t i = 0; i < n; ++i) any |= mask[i], all &= mask[i];
    return all ? SHOWN : any ? MIXED : HIDDEN;
  }

  // `length` values or rows from the place `from` of the mask, cut into what is shown, hidden, and
  // both within a tile: f(from, length, seen).
  template <class F>
  INLINE void stretches(int64_t from, int64_t length, int64_t tile, F f) const {
    if (!job.mask) return f(from, length, SHOWN);
    int64_t end = from + length, size = least(tile, length);
    Seen now = seen(job.mask + from, size);
    while (from < end) {
      int64_t to = from + size;
      Seen next = now;
      while (to < end) {
        size = least(tile, end - to);
        next = seen(job.mask + to, size);
        if (next != now || now == MIXED) break;
        to += size;
      }
      f(from, to - from, now);
      from = to;
      now = next;
    }
  }

  // Runs of channel c in part p, cut where the mask changes: f(offset, length, seen, their mask).
  template <class F>
  INLINE void runs(int64_t c, int64_t part, F f) const {
    int64_t at = part * pieces.size, end = least(at + pieces.size, job.N * job.S);
    while (at < end) {
      int64_t n = at / job.S, s = at % job.S, length = least(job.S - s, end - at);
      one_run(at, (n * job.C + c) * job.S + s, length, f);
      at += length;
    }
  }
  // `length` values at `at`, whose mask begins at `place`.
  template <class F>
  INLINE void one_run(int64_t place, int64_t at, int64_t length, F f) const {
    stretches(place, length, TILE, [&](int64_t from, int64_t size, Seen seen) INLINE_LAMBDA {
      f(at + from - place, size, seen, job.mask + from);
    });
  }

  // Places of a few values, far apart, that are all shown.
  INLINE void choose_samples() {
    int64_t places = job.N * job.S, last = 0;
    if (job.mask) {
      while (last < places && !job.mask[last]) ++last;
    }
    for (int64_t k = 0; k < SAMPLES; ++k) {
      int64_t at = places * k / SAMPLES, end = places * (k + 1) / SAMPLES;
      if (job.mask) {
        while (at < end && !job.mask[at]) ++at;
        if (at == end) at = last;
      }
      samples[k] = last = at;
    }
  }

  // The mean of a few values, far apart, whose number is a power of two: equal ones give
  // themselves.
  INLINE void choose_shifts(int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; ++c) shift[c] = 0;
    for (int64_t k = 0; k < SAMPLES; ++k) {
      int64_t n = samples[k] / job.S, s = samples[k] % job.S;
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

  // What is done once a channel is done for several side by side, so that their roots and quotients
  // are those of vectors: f(first channel, how many), at most SIDE.
  static constexpr int64_t SIDE = 64;
  template <class F>
  INLINE void side_by_side(int64_t c0, int64_t c1, F f) const {
    for (int64_t c = c0; c < c1; c += SIDE) f(c, least(SIDE, c1 - c));
  }

  // Channels of parts that have been added: job.mean and job.var; whether they are to be believed.
  NOINLINE bool join(int64_t c0, int64_t c1) {
    bool good = true;
    double count = double(job.count);
    side_by_side(c0, c1, [&](int64_t c, int64_t n) INLINE_LAMBDA {
      double *mean = job.mean + c, *var = job.var + c, off[SIDE];
      const double *s = first + c, *q = second + c, *by = shift + c;
      for (int64_t i = 0; i < n; ++i) {
        off[i] = s[i] / count;
        double v = q[i] / count - off[i] * off[i];
        mean[i] = by[i] + off[i];
        var[i] = v > 0 || v != v ? v : 0;
      }
      for (int64_t i = 0; i < n; ++i) {
        // What cancelled between q and off is lost.
        double most = AT_ONCE ? 1 : 16;
        if (off[i] * off[i] <= most * var[i] && var[i] - var[i] == 0) continue;
        double to = mean[i];
        if (to - to == 0) shift[c + i] = to;
        good = good && off[i] == 0 && var[i] == 0;
      }
    });
    return good;
  }

  // r and d of channel c: those that make of its values what the running statistics would.
  INLINE void renormalize(int64_t c) {
    double std = __builtin_sqrt(job.running_var[c] + job.eps);
    double r = __builtin_sqrt(job.var[c] + job.eps) / std, d = (job.mean[c] - job.running_mean[c]) / std;
    job.r[c] = r > job.rmax ? job.rmax : r < 1 / job.rmax ? 1 / job.rmax : r;
    job.d[c] = d > job.dmax ? job.dmax : d < -job.dmax ? -job.dmax : d;
  }

  NOINLINE void prepare(int64_t c0, int64_t c1) {
    side_by_side(c0, c1, [&](int64_t c, int64_t n) INLINE_LAMBDA {
      double k[SIDE], o[SIDE];
      const double *mean = job.mean + c, *var = job.var + c;
      A* rounded = affine.mean + c;
      for (int64_t i = 0; i < n; ++i) {
        k[i] = 1 / __builtin_sqrt(var[i] + job.eps);
        rounded[i] = A(mean[i]);
        double off = double(rounded[i]) - mean[i];
        o[i] = off - off == 0 ? off * k[i] : 0;
      }
      for (int64_t i = 0; job.running_mean && i < n; ++i) renormalize(c + i);
      for (int64_t i = 0; job.r && i < n; ++i) {
        k[i] *= job.r[c + i];
        o[i] = o[i] * job.r[c + i] + job.d[c + i];
      }
      for (int64_t i = 0; job.weight && i < n; ++i) {
        k[i] *= job.weight[c + i];
        o[i] *= job.weight[c + i];
      }
      for (int64_t i = 0; job.bias && i < n; ++i) o[i] += job.bias[c + i];
      for (int64_t i = 0; i < n; ++i) {
        affine.scale[c + i] = A(k[i]);
        affine.offset[c + i] = A(o[i]);
      }
    });
  }

  // dx: a * dy + b * (x - mean) + c.
  NOINLINE void prepare_gradient(int64_t c0, int64_t c1) {
    double count = double(job.count);
    side_by_side(c0, c1, [&](int64_t c, int64_t n) INLINE_LAMBDA {
      double k[SIDE], inverse[SIDE];
      for (int64_t i = 0; i < n; ++i) k[i] = inverse[i] = 1 / __builtin_sqrt(job.var[c + i] + job.eps);
      for (int64_t i = 0; job.weight && i < n; ++i) k[i] *= job.weight[c + i];
      for (int64_t i = 0; job.r && i < n; ++i) k[i] *= job.r[c + i];
      A *pa = affine.a + c, *pb = affine.b + c, *pc = affine.c + c;
      for (int64_t i = 0; i < n; ++i) pa[i] = A(k[i]);
      if (!job.train) {
        for (int64_t i = 0; i < n; ++i) pb[i] = pc[i] = 0;
        return;
      }
      const double *mean = job.mean + c, *sum = job.sum + c, *product = job.product + c;
      const A* rounded = affine.mean + c;
      for (int64_t i = 0; i < n; ++i) {
        double slip = mean[i] - double(rounded[i]);  // x - affine.mean has this mean
        slip = slip - slip == 0 ? slip : 0;
        double b = -k[i] * inverse[i] * inverse[i] * product[i] / count;
        pb[i] = A(b);
        pc[i] = A(-k[i] * sum[i] / count - b * slip);
      }
    });
  }

  NOINLINE void join_sums(int64_t c0, int64_t c1) {
    double count = double(job.count);
    double *mean = job.mean, *sum = job.sum, *product = job.product;
    for (int64_t c = c0; c < c1; ++c) {
      // Taken about affine.mean, which is job.mean rounded, or the mean given, which may be too.
      double at = affine.mean[c], slip = third[c] / count;
      if (job.train && slip - slip == 0) mean[c] = at + slip;
      sum[c] = first[c];
      product[c] = second[c] - (mean[c] - at) * first[c];
    }
  }

  // ---- pieces, of planes and of rows

  template <bool EXACT>
  INLINE void moments_piece(int64_t block, int64_t part) {
    if (job.layout == Layout::planes) {
      Sums sums;
      runs(block, part, [&](int64_t at, int64_t n, Seen seen, const uint8_t* mask) INLINE_LAMBDA {
        if (seen == HIDDEN) return;
        if (seen == SHOWN) {
          moments_run<T, EXACT>(x + at, n, shift[block], ahead_of(job), sums);
          return;
        }
        // Wide enough for the shift, from which what is hidden does not differ.
        typedef Either<EXACT, double, A> Covering;
        Covering covered[TILE];
        cover(x + at, mask, Covering(shift[block]), covered, n);
        moments_run<Covering, EXACT>(covered, n, shift[block], 0, sums);
      });
      first[part * job.C + block] = total(sums.first[0] + sums.first[1]) + sums.first1;
      second[part * job.C + block] = total(sums.second[0] + sums.second[1]) + sums.second1;
      return;
    }
    int64_t c0 = block * pieces.width, c1 = least(c0 + pieces.width, job.C), S = job.S;
    int64_t n = (c1 - c0) * S, fold = folded(n);
    double by[BLOCK], s[BLOCK], q[BLOCK];
    float by32[BLOCK];
    expand(shift, c0, c1, by, fold);
    for (int64_t i = 0; i < n * fold; ++i) {
      s[i] = q[i] = 0;
      by32[i] = float(by[i]);
    }
    Rows all = {x, nullptr, nullptr, nullptr};
    each_fold(all, c0, part, n, fold, [&](const Rows& at, int64_t rows, int64_t times) INLINE_LAMBDA {
      moments_rows<T, EXACT>(at.x, 0, rows, at.stride * times, n * times, by, by32, far(job), s, q);
    });
    unfold(s, n, fold);
    unfold(q, n, fold);
    gather(c0, c1, part, s, first);
    gather(c0, c1, part, q, second);
  }

  // How many rows of n columns are summed as one, so that they fill whole vectors.
  INLINE int64_t folded(int64_t n) const {
    if (pieces.blocks > 1) return 1;
    int64_t fold = 1;
    while (n * fold % LF != 0) fold *= 2;
    return n * fold <= BLOCK ? fold : 1;
  }
  // Rows of those tensors that a sum is of.
  struct Rows {
    const T *x, *dy, *residual, *out;
    int64_t stride = 0;
    template <class F>
    INLINE void each(F f) {
      const T** all[] = {&x, &dy, &residual, &out};
      for (const T** p : all) {
        if (*p) f(*p);
      }
    }
  };
  // The shown rows of a part, `fold` at a time while there are so many: f(where they are, rows,
  // times). Few that lie together are copied, to be as many as the others.
  template <class F>
  INLINE void each_fold(const Rows& all, int64_t c0, int64_t part, int64_t n, int64_t fold,
                        F f) const {
    int64_t r0 = part * pieces.size, r1 = least(r0 + pieces.size, job.N);
    auto work = [&](Rows at, int64_t rows) {
      int64_t whole = fold > 1 ? rows / fold : 0;
      if (whole) f(at, whole, fold);
      at.each([&](const T*& p) { p += whole * fold * n; });
      if (rows -= whole * fold) f(at, rows, int64_t(1));
    };
    T copies[4][COPIED];
    Rows copied = all;
    int64_t held = 0, k = 0;
    copied.stride = n;
    copied.each([&](const T*& p) { p = copies[k++]; });
    stretches(r0, r1 - r0, 1, [&](int64_t row, int64_t rows, Seen seen) {
      if (seen == HIDDEN) return;
      Rows at = all;
      at.stride = job.C * job.S;
      at.each([&](const T*& p) { p += row * at.stride + c0 * job.S; });
      if (!job.mask || rows >= FEW) return work(at, rows);
      for (int64_t r = 0; r < rows; ++r) {
        int64_t k = 0;
        at.each([&](const T*& p) {
          __builtin_memcpy((void*)(copies[k++] + held * n), p, size_t(n) * sizeof(T));
          p += at.stride;
        });
        if (++held < COPIED / n) continue;
        work(copied, held);
        held = 0;
      }
    });
    if (held) work(copied, held);
  }
  static constexpr int64_t COPIED = 4 * BLOCK, FEW = 32;
  INLINE void unfold(double* sums, int64_t n, int64_t fold) const {
    for (int64_t i = n; i < n * fold; ++i) sums[i % n] += sums[i];
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
    return pieces.blocks > 1 ? 1 : most(1, least(BLOCK / n, rows));
  }

  // What a gradient comes from, and whether the residual's is written: what has been kept is both.
  template <Mode MODE>
  INLINE const T* from() const {
    return MODE == PLAIN && kept ? kept : dy;
  }
  template <Mode MODE>
  INLINE bool to_residual() const {
    return dresidual && !(MODE == PLAIN && kept);
  }

  // Zeros in those of `rows` rows of n columns that are hidden.
  INLINE void hide(T* to, int64_t row, int64_t rows, int64_t c0, int64_t n) const {
    if (!job.mask || !to) return;
    for (int64_t r = row; r < row + rows; ++r) {
      if (!job.mask[r]) {
        __builtin_memset((void*)(to + (r * job.C + c0) * job.S), 0, size_t(n) * sizeof(T));
      }
    }
  }

  // n values of channel c that lie side by side; zero where they are not shown.
  template <Mode MODE, bool RESIDUAL>
  INLINE void apply_stretch(int64_t c, int64_t at, int64_t n, Seen seen, const uint8_t* mask) {
    if (seen == HIDDEN) {
      __builtin_memset((void*)(y + at), 0, size_t(n) * sizeof(T));
      return;
    }
    T tile[TILE], *to = seen == MIXED ? tile : y + at;
    apply_run<T, MODE, RESIDUAL, false>(seen == MIXED ? cached : job, x + at,
                                        residual + (RESIDUAL ? at : 0), to, n, affine.mean + c,
                                        affine.scale + c, affine.offset + c);
    if (seen == MIXED) put_shown(tile, mask, y + at, n, job.stream);
  }
  template <Mode MODE, bool OUTPUT>
  INLINE void gradient_stretch(int64_t c, int64_t at, int64_t n, Seen seen, const uint8_t* mask) {
    if (seen == HIDDEN) {
      if (dx) __builtin_memset((void*)(dx + at), 0, size_t(n) * sizeof(T));
      if (dresidual) __builtin_memset((void*)(dresidual + at), 0, size_t(n) * sizeof(T));
      return;
    }
    T tiles[2][TILE], *to = dx ? dx + at : nullptr;
    T* beside = to_residual<MODE>() ? dresidual + at : nullptr;
    bool mixed = seen == MIXED;
    gradient_run<T, MODE, OUTPUT, false>(
        mixed ? cached : job, x + at, residual ? residual + at : nullptr, out ? out + at : nullptr,
        from<MODE>() + at, kept ? kept + at : nullptr, to && mixed ? tiles[0] : to,
        beside && mixed ? tiles[1] : beside, n, affine, c);
    if (mixed && to) put_shown(tiles[0], mask, to, n, job.stream);
    if (mixed && beside) put_shown(tiles[1], mask, beside, n, job.stream);
  }

  template <Mode MODE, bool RESIDUAL>
  INLINE void apply_piece(int64_t block, int64_t part) {
    if (job.layout == Layout::planes) {
      runs(block, part, [&](int64_t at, int64_t n, Seen seen, const uint8_t* mask) INLINE_LAMBDA {
        apply_stretch<MODE, RESIDUAL>(block, at, n, seen, mask);
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
      apply_run<T, MODE, RESIDUAL, true>(job, x + at, residual + (RESIDUAL ? at : 0), y + at,
                                         n * least(step, r1 - r), m, k, o);
      hide(y, r, least(step, r1 - r), c0, n);
    }
  }

  template <Mode MODE, bool OUTPUT>
  INLINE void sums_piece(int64_t block, int64_t part) {
    if (job.layout == Layout::planes) {
      Sums sums;
      runs(block, part, [&](int64_t at, int64_t n, Seen seen, const uint8_t* mask) INLINE_LAMBDA {
        if (seen == HIDDEN) return;
        if (seen == SHOWN) {
          sums_run<T, MODE, OUTPUT>(job, x + at, residual ? residual + at : nullptr,
                                    out ? out + at : nullptr, dy + at, kept ? kept + at : nullptr,
                                    n, affine.mean + block, affine.scale + block,
                                    affine.offset + block, sums);
          return;
        }
        A covered[4][TILE];  // what is hidden is no difference from the mean, and no gradient
        const A* beside[4];
        const T* of[4] = {x, dy, residual, out};
        for (int64_t k = 0; k < 4; ++k) {
          beside[k] = of[k] ? covered[k] : nullptr;
          if (!of[k]) continue;
          cover(of[k] + at, mask, k == 0 ? affine.mean[block] : A(0), covered[k], n);
        }
        sums_run<A, MODE, OUTPUT>(job, beside[0], beside[2], beside[3], beside[1], nullptr, n,
                                  affine.mean + block, affine.scale + block, affine.offset + block,
                                  sums);
      });
      int64_t to = part * job.C + block;
      first[to] = total(sums.first[0] + sums.first[1]) + sums.first1;
      second[to] = total(sums.second[0] + sums.second[1]) + sums.second1;
      third[to] = total(sums.third[0] + sums.third[1]) + sums.third1;
      return;
    }
    int64_t c0 = block * pieces.width, c1 = least(c0 + pieces.width, job.C), S = job.S;
    int64_t n = (c1 - c0) * S, fold = folded(n);
    A m[BLOCK], k[BLOCK], o[BLOCK];
    double s[BLOCK], q[BLOCK], t[BLOCK];
    for (int64_t i = 0; i < n * fold; ++i) s[i] = q[i] = t[i] = 0;
    expand(affine.mean, c0, c1, m, fold);
    expand(affine.scale, c0, c1, k, fold);
    expand(affine.offset, c0, c1, o, fold);
    Rows all = {x, dy, residual, out};
    each_fold(all, c0, part, n, fold, [&](const Rows& at, int64_t rows, int64_t times) INLINE_LAMBDA {
      sums_rows<T, MODE, OUTPUT>(job, at.x, at.residual, at.out, at.dy,
                                 kept ? kept + (at.x - x) : nullptr, 0, rows, at.stride * times,
                                 n * times, m, k, o, s, q, t);
    });
    unfold(s, n, fold);
    unfold(q, n, fold);
    unfold(t, n, fold);
    gather(c0, c1, part, s, first);
    gather(c0, c1, part, q, second);
    gather(c0, c1, part, t, third);
  }

  template <Mode MODE, bool OUTPUT>
  INLINE void gradient_piece(int64_t block, int64_t part) {
    if (job.layout == Layout::planes) {
      runs(block, part, [&](int64_t at, int64_t n, Seen seen, const uint8_t* mask) INLINE_LAMBDA {
        gradient_stretch<MODE, OUTPUT>(block, at, n, seen, mask);
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
      gradient_run<T, MODE, OUTPUT, true>(job, x + at, residual ? residual + at : nullptr,
                                          out ? out + at : nullptr, from<MODE>() + at,
                                          kept ? kept + at : nullptr, dx ? dx + at : nullptr,
                                          to_residual<MODE>() ? dresidual + at : nullptr,
                                          n * least(step, r1 - r), p, 0);
      hide(dx, r, least(step, r1 - r), c0, n);
      hide(dresidual, r, least(step, r1 - r), c0, n);
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
    add_parts(first, block);
    add_parts(second, block);
    return join(begin(block), end(block));
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
      prepare(0, job.C);
      if (job.layout == Layout::planes) {
        each_run([&](int64_t run) { apply_of<MODE, RESIDUAL>(run); });
      } else {
        each_piece([&](int64_t block, int64_t part) { apply_one<MODE, RESIDUAL>(block, part); });
      }
      return;
    }
    each_block([&](int64_t block) {
      find_moments(block);
      prepare(begin(block), end(block));
      for (int64_t p = 0; p < pieces.parts; ++p) apply_one<MODE, RESIDUAL>(block, p);
    });
  }

  template <Mode MODE, bool RESIDUAL>
  NOINLINE void apply_of(int64_t run) {
    int64_t c = run % job.C, at = run * job.S;
    auto stretch = [&](int64_t at, int64_t n, Seen seen, const uint8_t* mask) INLINE_LAMBDA {
      apply_stretch<MODE, RESIDUAL>(c, at, n, seen, mask);
    };
    one_run(run / job.C * job.S, at, job.S, stretch);
  }
  template <Mode MODE, bool OUTPUT>
  NOINLINE void gradient_of(int64_t run) {
    int64_t c = run % job.C, at = run * job.S;
    auto stretch = [&](int64_t at, int64_t n, Seen seen, const uint8_t* mask) INLINE_LAMBDA {
      gradient_stretch<MODE, OUTPUT>(c, at, n, seen, mask);
    };
    one_run(run / job.C * job.S, at, job.S, stretch);
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
    prepare(0, job.C);
    // An activation's slope is computed once, where what it gives can be written without loss. That
    // of a ReLU is 0 or 1: by the output the residual's gradient is written first, and x's follows
    // from it as without an activation.
    constexpr Mode SECOND = MODE == RELU && OUTPUT ? PLAIN : MODE;
    bool both = with_sums && with_gradient && !job.mask;
    if (MODE == TILED && both && sizeof(T) == sizeof(A)) kept = dresidual ? dresidual : dx;
    if (MODE != SECOND && both && dx) kept = dresidual;
    auto gradient = [&](int64_t block, int64_t part) {
      MODE != SECOND && kept ? gradient_one<SECOND, false>(block, part)
                             : gradient_one<MODE, OUTPUT>(block, part);
    };
    auto after = [&](int64_t block) {
      if (with_sums) {
        add_parts(first, block);
        add_parts(second, block);
        add_parts(third, block);
      }
      if (with_sums) join_sums(begin(block), end(block));
      if (with_gradient) prepare_gradient(begin(block), end(block));
    };
    if (with_sums && by_block()) {
      each_block([&](int64_t block) {
        for (int64_t p = 0; p < pieces.parts; ++p) sums_one<MODE, OUTPUT>(block, p);
        after(block);
        if (!with_gradient) return;
        for (int64_t p = 0; p < pieces.parts; ++p) gradient(block, p);
      });
      return;
    }
    if (with_sums) {
      each_piece([&](int64_t block, int64_t part) { sums_one<MODE, OUTPUT>(block, part); });
    }
    for (int64_t block = 0; block < pieces.blocks; ++block) after(block);
    if (with_gradient && job.layout == Layout::planes) {
      each_run([&](int64_t run) {
        MODE != SECOND && kept ? gradient_of<SECOND, false>(run) : gradient_of<MODE, OUTPUT>(run);
      });
    } else if (with_gradient) {
      each_piece(gradient);
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
