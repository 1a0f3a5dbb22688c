// 256-bit vectors: AVX2, FMA and F16C.
// Included inside the namespace of one instruction set; see kernels.h.

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kAccumulators = 12;
  static constexpr int64_t kStreamedRows = 12;
  static constexpr int kDotColumns = 4, kDotSteps = 1, kIntegerColumns = 3, kIntegerSums = 9;
  static constexpr bool kWidensPanelsOnce = false;
  static constexpr bool kPrefetchesColumns = false;
  static constexpr int64_t kTileAheadInL1 = 0;
  static constexpr bool kBf16Dot = false;
  typedef float V __attribute__((vector_size(32)));
  typedef int32_t VI __attribute__((vector_size(32)));

  static void free_other_registers() {}  // so few leave none for other uses

  static V load(const void* p) { return (V)_mm256_loadu_ps(static_cast<const float*>(p)); }
  static void store(void* p, V v) { _mm256_storeu_ps(static_cast<float*>(p), (__m256)v); }
  // Past the caches, at aligned addresses; other threads may read once the stream has ended.
  static void stream(void* p, V v) { _mm256_stream_ps(static_cast<float*>(p), (__m256)v); }
  static void stream_low_halves(void* p, VI v) { _mm_stream_si128(static_cast<__m128i*>(p), low_halves(v)); }
  static void end_stream() { _mm_sfence(); }
  static V broadcast(float x) { return (V)_mm256_set1_ps(x); }
  static V multiply_add(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

  // One shuffle within 128-bit lanes instead of vpmovzxwd, which crosses them, and a shift.
  static V load_bf16(const uint16_t* p) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i high_halves =
        _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                         -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    return (V)_mm256_shuffle_epi8(twice, high_halves);
  }
  static V load_f16(const uint16_t* p) {
    return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // Two vectors.
  static void load_int8(const int8_t* p, V (&two)[2]) {
    for (int i = 0; i < 2; ++i) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + i * kLanes));
      two[i] = (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
  }
  // Vectors of twice kLanes int16.
  static VI widen_int8(const int8_t* p) {
    return (VI)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // Of two rows of int8, one after the other, vector v of the pairs in their columns.
  static VI pair_int8(const int8_t* rows, int v) {
    const auto* p = reinterpret_cast<const __m128i*>(rows);
    const __m128i a = _mm_loadu_si128(p), b = _mm_loadu_si128(p + 1);
    return (VI)_mm256_cvtepi8_epi16(v == 0 ? _mm_unpacklo_epi8(a, b) : _mm_unpackhi_epi8(a, b));
  }
  static VI widen_int4(const int32_t* run, int v) {
    const __m256i halves = (__m256i)load(run);
    return (VI)_mm256_srai_epi16(_mm256_slli_epi16(halves, 12 - 4 * v), 12);
  }
  // Adds the products of neighbouring pairs.
  static VI multiply_add_int16(VI a, VI b, VI c) {
    c += (VI)_mm256_madd_epi16((__m256i)a, (__m256i)b);
    asm("" : "+x"(c));  // GCC would add later, and run out of registers for what is to be added
    return c;
  }
  // Two vectors of fp8 e4m3 times 2^-8: fp16 of the same bits, whose exponents mean that much less, so that
  // subnormal numbers are right whatever the processor's modes are. All bits of a NaN are set.
  static void load_fp8(const uint8_t* p, V (&two)[2]) {
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i with_signs = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 1);
    const __m256i numbers = _mm256_and_si256(with_signs, _mm256_set1_epi16(-0x4001));
    const __m256i nan = _mm256_set1_epi16(0x3f80);
    const __m256i is_nan = _mm256_cmpeq_epi16(_mm256_and_si256(numbers, nan), nan);
    const __m256i halves = _mm256_or_si256(numbers, is_nan);
    two[0] = (V)_mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    two[1] = (V)_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  }
  static __m128i low_halves(VI v) {
    const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
  static void store_low_halves(uint16_t* p, VI v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), low_halves(v));
  }
  static void store_f16(uint16_t* p, V v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
  }

  // The first n floats, 1 <= n <= kLanes; the others are zero and not read.
  static V load_first(const float* p, int64_t n) {
    alignas(64) static constexpr int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    const __m256i mask = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + kLanes - n));
    return (V)_mm256_maskload_ps(p, mask);
  }

  // The sum over the lanes of each of four vectors.
  static void lane_sums(const V* v, float* sums) {
    const __m256 a = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]);
    const __m256 b = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
    const __m256 halves = _mm256_hadd_ps(a, b);
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
  }

  static void transpose(V (&rows)[kLanes]) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
      a[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
      a[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
      b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
      b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
      b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      rows[i] = (V)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
      rows[i + 4] = (V)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
  }
};
