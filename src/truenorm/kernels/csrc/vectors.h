// Vectors of BYTES bytes for one instruction set. Included once for each, within its namespace and
// its target; nothing here may call a template of the standard library, whose copies are shared.
template <class A>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(BYTES)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(BYTES)));
};
typedef typename Vector<float>::type VF;
typedef typename Vector<double>::type VD;
constexpr int64_t LF = BYTES / 4, LD = BYTES / 8;  // lanes

template <class A>
constexpr int64_t lanes = BYTES / sizeof(A);
template <class A>
using vec = typename Vector<A>::type;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Wide {
  typedef float type;
};
template <>
struct Wide<double> {
  typedef double type;
};
template <class T>
using wide = typename Wide<T>::type;  // in which values of T are computed

INLINE float widen(float v) { return v; }
INLINE double widen(double v) { return v; }
INLINE float widen(bf16 v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}
INLINE float widen(f16 v) {
  uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff, bits;
  float out;
  if (rest >= 0x7c00) {
    bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = sign | ((rest << 13) + (112u << 23));
  } else {  // a denormal: its integer times 2^-24, exactly
    out = float(rest) * 0x1p-24f;
    return sign ? -out : out;
  }
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

template <class T>
INLINE T narrow(wide<T> v);
template <>
INLINE float narrow<float>(float v) {
  return v;
}
template <>
INLINE double narrow<double>(double v) {
  return v;
}
template <>
INLINE bf16 narrow<bf16>(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  if (v != v) return {uint16_t(0x7fc0)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
INLINE f16 narrow<f16>(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (rest < 0x38800000) {  // a denormal: the addition rounds to its last place
    float magnitude, at = 0.5f;
    __builtin_memcpy(&magnitude, &rest, 4);
    magnitude += at;
    __builtin_memcpy(&rest, &magnitude, 4);
    return {uint16_t(sign | (rest - 0x3f000000))};
  }
  rest += 0xfff + (rest >> 13 & 1) - (112u << 23);
  return {uint16_t(sign | rest >> 13)};
}

// Whole vectors, unaligned.
INLINE VF load(const float* p) {
  VF v;
  __builtin_memcpy(&v, p, BYTES);
  return v;
}
INLINE VD load(const double* p) {
  VD v;
  __builtin_memcpy(&v, p, BYTES);
  return v;
}
INLINE void store(float* p, VF v) { __builtin_memcpy(p, &v, BYTES); }
INLINE void store(double* p, VD v) { __builtin_memcpy(p, &v, BYTES); }

// Past the caches, which would read the line first: for what is larger than they are. Aligned.
#if HALF == 2
INLINE void stream(float* p, VF v) { _mm512_stream_ps(p, (__m512)v); }
INLINE void stream(double* p, VD v) { _mm512_stream_pd(p, (__m512d)v); }
INLINE void end_of_stream() { _mm_sfence(); }
#elif HALF == 1
INLINE void stream(float* p, VF v) { _mm256_stream_ps(p, (__m256)v); }
INLINE void stream(double* p, VD v) { _mm256_stream_pd(p, (__m256d)v); }
INLINE void end_of_stream() { _mm_sfence(); }
#else
INLINE void stream(float* p, VF v) { store(p, v); }
INLINE void stream(double* p, VD v) { store(p, v); }
INLINE void end_of_stream() {}
#endif

typedef uint16_t V16 __attribute__((vector_size(BYTES / 2)));
typedef uint32_t V32 __attribute__((vector_size(BYTES)));
INLINE VF load(const bf16* p) {
  V16 v;
  __builtin_memcpy(&v, p, BYTES / 2);
  return (VF)(__builtin_convertvector(v, V32) << 16);
}
INLINE void store(bf16* p, VF v) {
  V32 bits = (V32)v;
  V32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  V32 nan = (V32)(v != v);
  V16 out = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), V16);
  __builtin_memcpy(p, &out, BYTES / 2);
}
#if HALF == 2
INLINE VF load(const f16* p) { return (VF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void store(f16* p, VF v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif HALF == 1
INLINE VF load(const f16* p) { return (VF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store(f16* p, VF v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
INLINE VF load(const f16* p) {
  VF v;
  for (int64_t i = 0; i < LF; ++i) v[i] = widen(p[i]);
  return v;
}
INLINE void store(f16* p, VF v) {
  for (int64_t i = 0; i < LF; ++i) p[i] = narrow<f16>(v[i]);
}
#endif

template <class T>
INLINE void stream(T* p, VF v) {
  store(p, v);
}
INLINE bool aligned(const void* p) { return (uintptr_t(p) & (BYTES - 1)) == 0; }

// Holds v in a register: what is loaded is not to become part of a masked load, which costs several
// plain ones.
template <class V>
INLINE V held(V v) {
#if HALF
  asm("" : "+v"(v));
#endif
  return v;
}

// LD values as doubles.
typedef float HalfF __attribute__((vector_size(BYTES / 2)));
INLINE VD load_double(const double* p) { return load(p); }
#if HALF == 2
INLINE VD load_double(const float* p) { return (VD)_mm512_cvtps_pd(_mm256_loadu_ps(p)); }
#elif HALF == 1
INLINE VD load_double(const float* p) { return (VD)_mm256_cvtps_pd(_mm_loadu_ps(p)); }
#else
INLINE VD load_double(const float* p) {
  HalfF v;
  __builtin_memcpy(&v, p, BYTES / 2);
  return __builtin_convertvector(v, VD);
}
#endif
template <class T>
INLINE VD load_double(const T* p) {
  HalfF v;
  for (int64_t i = 0; i < LD; ++i) v[i] = widen(p[i]);
  return __builtin_convertvector(v, VD);
}
INLINE VD load_double(const bf16* p) {
  typedef uint16_t Q16 __attribute__((vector_size(BYTES / 4)));
  typedef uint32_t Q32 __attribute__((vector_size(BYTES / 2)));
  Q16 v;
  __builtin_memcpy(&v, p, BYTES / 4);
  return __builtin_convertvector((HalfF)(__builtin_convertvector(v, Q32) << 16), VD);
}
#if HALF == 2
INLINE VD load_double(const f16* p) {
  return __builtin_convertvector((HalfF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), VD);
}
#elif HALF == 1
INLINE VD load_double(const f16* p) {
  return __builtin_convertvector((HalfF)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)), VD);
}
#endif

INLINE double total(VD v) {  // in a fixed order
  double out = 0;
  for (int64_t i = 0; i < LD; ++i) out += v[i];
  return out;
}
template <class A>
INLINE vec<A> spread(A v) {
  return v - vec<A>{};
}

// The halves of a vector of floats, as doubles; compilers make three instructions of one.
#if HALF == 2
INLINE VD lower(VF v) { return (VD)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)); }
INLINE VD upper(VF v) { return (VD)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1)); }
#elif HALF == 1
INLINE VD lower(VF v) { return (VD)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)); }
INLINE VD upper(VF v) { return (VD)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1)); }
#else
INLINE VD lower(VF v) { return __builtin_convertvector(__builtin_shufflevector(v, v, 0, 1), VD); }
INLINE VD upper(VF v) { return __builtin_convertvector(__builtin_shufflevector(v, v, 2, 3), VD); }
#endif
