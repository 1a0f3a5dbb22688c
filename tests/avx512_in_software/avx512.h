// The AVX-512 intrinsics of simd_avx512.h, by the processor manual, in code that any compiler target accepts
// but for F16C and FMA. Included inside a namespace: unqualified calls in it then mean these. An intrinsic
// that is missing here does not compile, as the compiler's own needs AVX-512.

#undef _mm512_shuffle_ps  // macros, where the compiler wants to see constants
#undef _mm512_shuffle_f32x4
#undef _mm512_cvtps_ph
#undef _mm512_slli_epi32
#undef _mm512_extractf32x8_ps

template <class To, class From>
To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// A vector as an array, to and from any vector type of its size.
template <class T, int kCount>
struct Elements {
  Elements() = default;
  template <class Vector>
  Elements(Vector v) : Elements(bits_as<Elements>(v)) {}
  template <class Vector>
  operator Vector() const {
    return bits_as<Vector>(*this);
  }
  T& operator[](int i) { return at[i]; }
  T operator[](int i) const { return at[i]; }
  T at[kCount];
};
using Floats16 = Elements<float, 16>;
using Ints16 = Elements<uint32_t, 16>;
using Halves32 = Elements<uint16_t, 32>;
using Halves16 = Elements<uint16_t, 16>;

// The processor raises an exception.
inline void need_alignment(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) __builtin_trap();
}

inline __m512 _mm512_loadu_ps(const void* p) {
  __m512 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The elements that the mask leaves out are not read.
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  Floats16 v = {};
  for (int i = 0; i < 16; ++i) {
    float x;
    if (mask >> i & 1) std::memcpy(&x, static_cast<const char*>(p) + 4 * i, 4), v[i] = x;
  }
  return v;
}

inline void _mm512_storeu_ps(void* p, __m512 v) { std::memcpy(p, &v, sizeof v); }

inline void _mm512_stream_ps(float* p, __m512 v) {
  need_alignment(p);
  _mm512_storeu_ps(p, v);
}

inline __m512i _mm512_loadu_si512(const void* p) { return bits_as<__m512i>(_mm512_loadu_ps(p)); }

inline __m512i _mm512_load_si512(const void* p) {
  need_alignment(p);
  return _mm512_loadu_si512(p);
}

inline __m512 _mm512_set1_ps(float x) {
  Floats16 v;
  for (int i = 0; i < 16; ++i) v[i] = x;
  return v;
}

inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Floats16 x = a, y = b, z = c;
  Floats16 v;
  for (int i = 0; i < 16; ++i) v[i] = __builtin_fmaf(x[i], y[i], z[i]);
  return v;
}

// Neighbouring products are added; only -2^15 * -2^15 twice wraps around.
inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  const Elements<int16_t, 32> x = a, y = b;
  Ints16 v;
  for (int i = 0; i < 16; ++i)
    v[i] = static_cast<uint32_t>(x[2 * i] * y[2 * i]) + static_cast<uint32_t>(x[2 * i + 1] * y[2 * i + 1]);
  return v;
}

inline __m512i _mm512_dpwssd_epi32(__m512i c, __m512i a, __m512i b) {
  const Ints16 sums = c, products = _mm512_madd_epi16(a, b);
  Ints16 v;
  for (int i = 0; i < 16; ++i) v[i] = sums[i] + products[i];
  return v;
}

inline __m512i _mm512_broadcast_i64x4(__m256i a) {
  __m512i twice;
  for (int i = 0; i < 2; ++i) std::memcpy(reinterpret_cast<char*>(&twice) + 32 * i, &a, sizeof a);
  return twice;
}

// ---------------------------------------------------------------- conversions

inline __m512i _mm512_cvtepu16_epi32(__m256i halves) {
  const Halves16 from = halves;
  Ints16 v;
  for (int i = 0; i < 16; ++i) v[i] = from[i];
  return v;
}

inline __m512i _mm512_cvtepi8_epi16(__m256i bytes) {
  const Elements<int8_t, 32> from = bytes;
  Halves32 v;
  for (int i = 0; i < 32; ++i) v[i] = static_cast<uint16_t>(from[i]);
  return v;
}

inline __m512i _mm512_cvtepi8_epi32(__m128i bytes) {
  const Elements<int8_t, 16> from = bytes;
  Ints16 v;
  for (int i = 0; i < 16; ++i) v[i] = static_cast<uint32_t>(from[i]);
  return v;
}

inline __m512 _mm512_cvtepi32_ps(__m512i ints) {
  const Ints16 from = ints;
  Floats16 v;
  for (int i = 0; i < 16; ++i) v[i] = static_cast<float>(static_cast<int32_t>(from[i]));
  return v;
}

inline __m256i _mm512_cvtepi32_epi16(__m512i ints) {
  const Ints16 from = ints;
  Halves16 v;
  for (int i = 0; i < 16; ++i) v[i] = static_cast<uint16_t>(from[i]);
  return v;
}

inline __m512i _mm512_slli_epi32(__m512i ints, unsigned count) {
  const Ints16 from = ints;
  Ints16 v;
  for (int i = 0; i < 16; ++i) v[i] = count < 32 ? from[i] << count : 0;
  return v;
}

inline __m512 _mm512_cvtph_ps(__m256i halves) {
  const __m256 parts[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                           _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
  return _mm512_loadu_ps(parts);
}

inline __m256i _mm512_cvtps_ph(__m512 v, int rounding) {
  if (rounding != _MM_FROUND_TO_NEAREST_INT) __builtin_trap();
  __m256 parts[2];
  _mm512_storeu_ps(parts, v);
  const __m128i low = _mm256_cvtps_ph(parts[0], _MM_FROUND_TO_NEAREST_INT);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                 _mm256_cvtps_ph(parts[1], _MM_FROUND_TO_NEAREST_INT), 1);
}

// ---------------------------------------------------------------- shuffles

inline __m256 _mm512_extractf32x8_ps(__m512 v, int half) {
  __m256 halves[2];
  _mm512_storeu_ps(halves, v);
  return halves[half & 1];
}

inline __m256 _mm512_castps512_ps256(__m512 v) { return _mm512_extractf32x8_ps(v, 0); }

// Within each lane of 128 bits: a[first], b[first], a[first + 1], b[first + 1].
inline __m512 unpack(__m512 a, __m512 b, int first) {
  const Floats16 x = a, y = b;
  Floats16 v;
  for (int i = 0; i < 16; ++i) v[i] = (i % 2 == 0 ? x : y)[i / 4 * 4 + first + i % 4 / 2];
  return v;
}

inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) { return unpack(a, b, 0); }
inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) { return unpack(a, b, 2); }

// Within each lane: two elements of a, then two of b, each chosen by two bits.
inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int choice) {
  const Floats16 x = a, y = b;
  Floats16 v;
  for (int i = 0; i < 16; ++i) v[i] = (i % 4 < 2 ? x : y)[i / 4 * 4 + (choice >> i % 4 * 2 & 3)];
  return v;
}

// The same with whole lanes.
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int choice) {
  const Floats16 x = a, y = b;
  Floats16 v;
  for (int i = 0; i < 16; ++i) v[i] = (i < 8 ? x : y)[(choice >> i / 4 * 2 & 3) * 4 + i % 4];
  return v;
}

// Of an index, the low five bits choose an element and the next one b.
inline __m512i _mm512_permutex2var_epi16(__m512i a, __m512i indices, __m512i b) {
  const Halves32 x = a, y = b, index = indices;
  Halves32 v;
  for (int i = 0; i < 32; ++i) v[i] = (index[i] & 32 ? y : x)[index[i] & 31];
  return v;
}

inline __m512i _mm512_permutexvar_epi16(__m512i indices, __m512i a) {
  return _mm512_permutex2var_epi16(a, indices, a);
}

// ---------------------------------------------------------------- bf16

#ifdef PADDLE_MOE_AVX512_BF16
inline float subnormal_as_zero(float x) {
  return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x;
}

// Rounded to nearest, ties to even; subnormal numbers become zero. The second operand becomes the lower half.
inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  const Floats16 floats[2] = {low, high};
  Halves32 v;
  for (int i = 0; i < 32; ++i) v[i] = float_to_bf16(subnormal_as_zero(floats[i / 16][i % 16]));
  return v;
}

// One multiply-add. What would be subnormal if the exponent had no limit is zero; halfway between the largest
// such number and the smallest normal one, and above, rounds to the latter.
inline float multiply_add_bf16(uint16_t a, uint16_t b, float c) {
  const float x = subnormal_as_zero(bf16_to_float(a)), y = subnormal_as_zero(bf16_to_float(b));
  const float sum = __builtin_fmaf(x, y, c);
  const bool is_tiny = __builtin_fabs(static_cast<double>(x) * y + c) < 0x1p-126 - 0x1p-151;
  return is_tiny ? __builtin_copysignf(0.0f, sum) : sum;
}

// The high halves first, and rounded before the low ones are added.
inline __m512 _mm512_dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  const Halves32 x = a, y = b;
  Floats16 sum = c;
  for (int i = 0; i < 16; ++i) {
    const float high = multiply_add_bf16(x[2 * i + 1], y[2 * i + 1], subnormal_as_zero(sum[i]));
    sum[i] = multiply_add_bf16(x[2 * i], y[2 * i], high);
  }
  return sum;
}
#endif
