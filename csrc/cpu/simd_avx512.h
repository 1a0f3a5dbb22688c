// 512-bit vectors: AVX-512 F, BW, VL and DQ; with PADDLE_MOE_AVX512_BF16 also its bf16 dot product.
// PADDLE_MOE_32_REGISTERS: the compiler has those of such a processor, tests/avx512_in_software has not.
// Included inside the namespace of one instruction set; see kernels.h.

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr int kAccumulators = 24;
  static constexpr int64_t kStreamedRows = 24;
  static constexpr int kDotColumns = 6, kDotSteps = 4, kIntegerColumns = 4, kIntegerSums = 12;
  static constexpr bool kWidensPanelsOnce = false;
  static constexpr bool kPrefetchesColumns = true;
  static constexpr int64_t kTileAheadInL1 = 1024;
  typedef float V __attribute__((vector_size(64)));
  typedef int32_t VI __attribute__((vector_size(64)));

  // Compilers keep pointers in vector registers, even where that leaves too few for the sums and the weights
  // of the loop that follows. Past this, none but kAccumulators hold anything.
  static void free_other_registers() {
#ifdef PADDLE_MOE_32_REGISTERS
    asm volatile("" : : : "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
#endif
  }

  static V load(const void* p) { return (V)_mm512_loadu_ps(p); }
  static void store(void* p, V v) { _mm512_storeu_ps(p, (__m512)v); }
  // Past the caches, at aligned addresses; other threads may read once the stream has ended.
  static void stream(void* p, V v) { _mm512_stream_ps(static_cast<float*>(p), (__m512)v); }
  static void stream_low_halves(void* p, VI v) {
    _mm256_stream_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)v));
  }
  static void end_stream() { _mm_sfence(); }
  static V broadcast(float x) { return (V)_mm512_set1_ps(x); }
  static V multiply_add(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

  static __m512i load_halves(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static V load_bf16(const uint16_t* p) { return (V)_mm512_slli_epi32(load_halves(p), 16); }
  static V load_f16(const uint16_t* p) {
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // Two vectors.
  static void load_int8(const int8_t* p, V (&two)[2]) {
    for (int i = 0; i < 2; ++i) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * kLanes));
      two[i] = (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
  }
  // Two vectors of fp8 e4m3 times 2^-8: fp16 of the same bits, whose exponents mean that much less, so that
  // subnormal numbers are right whatever the processor's modes are. All bits of a NaN are set.
  static void load_fp8(const uint8_t* p, V (&two)[2]) {
    for (int i = 0; i < 2; ++i) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * kLanes));
      const __m256i with_signs = _mm256_srai_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8), 1);
      const __m256i numbers = _mm256_and_si256(with_signs, _mm256_set1_epi16(-0x4001));
      const __m256i nan = _mm256_set1_epi16(0x3f80);
      const __m256i is_nan = _mm256_cmpeq_epi16(_mm256_and_si256(numbers, nan), nan);
      two[i] = (V)_mm512_cvtph_ps(_mm256_or_si256(numbers, is_nan));
    }
  }
  // Vectors of twice kLanes int16.
  static VI widen_int8(const int8_t* p) {
    return (VI)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // Of 32 halves, each of the upper 16 behind that of the lower ones.
  static V interleave_halves(V halves) {
    alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                             21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                             11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (V)_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), (__m512i)halves);
  }
  // Of two rows of int8, one after the other, the pairs in their columns.
  static VI pair_int8(const int8_t* rows, int) { return (VI)interleave_halves((V)widen_int8(rows)); }
  static VI widen_int4(const int32_t* run, int v) {
    typedef int16_t VH __attribute__((vector_size(64)));
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(run));
    const VH shifts = {12, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12,
                       8,  8,  8,  8,  8,  8,  8,  8,  8,  8,  8,  8,  8,  8,  8,  8};
    return (VI)((VH)_mm512_broadcast_i64x4(halves) << (shifts - static_cast<int16_t>(8 * v)) >> 12);
  }
  // Adds the products of neighbouring pairs.
  static VI multiply_add_int16(VI a, VI b, VI c) {
#ifdef PADDLE_MOE_AVX512_BF16
    return (VI)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#else
    c += (VI)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#ifdef PADDLE_MOE_32_REGISTERS
    asm("" : "+v"(c));  // GCC would add later, and run out of registers for what is to be added
#endif
    return c;
#endif
  }
  static void store_low_halves(uint16_t* p, VI v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)v));
  }
  static void store_f16(uint16_t* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
  }

#ifdef PADDLE_MOE_AVX512_BF16
  static constexpr bool kBf16Dot = true;
  // 32 pairs (low[i], high[i]), in the order in which dot_bf16 multiplies them.
  static void pair_halves(const uint16_t* low, const uint16_t* high, V (&pairs)[2]) {
    alignas(64) static constexpr uint16_t kInterleave[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i a = _mm512_loadu_si512(low), b = _mm512_loadu_si512(high);
    pairs[0] = (V)_mm512_permutex2var_epi16(a, _mm512_load_si512(kInterleave), b);
    pairs[1] = (V)_mm512_permutex2var_epi16(a, _mm512_load_si512(kInterleave + 32), b);
  }
  // What bf16 holds exactly.
  static V as_bf16(const V (&two)[2]) { return (V)_mm512_cvtne2ps_pbh((__m512)two[1], (__m512)two[0]); }
  // The int4 number at a bit of each half.
  static V int4_halves_as_bf16(V halves, int bit) {
    // By the low five bits of each half, of which the fifth is another number's.
    alignas(64) static constexpr uint16_t kNumbers[32] = {
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0,
        0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
        0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
    typedef uint16_t VH __attribute__((vector_size(64)));
    return (V)_mm512_permutexvar_epi16((__m512i)((VH)halves >> static_cast<uint16_t>(bit)),
                                       _mm512_load_si512(kNumbers));
  }
  static V int4_as_bf16(const int32_t* run, int v) {
    typedef uint16_t VH __attribute__((vector_size(64)));
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(run));
    const VH shifts = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                       4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4};
    return int4_halves_as_bf16((V)((VH)_mm512_broadcast_i64x4(halves) >> shifts), 8 * v);
  }
  static V dot_bf16(V a, V b, V c) {
    return (V)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
  }
#else
  static constexpr bool kBf16Dot = false;
#endif

  // The first n floats, 1 <= n <= kLanes; the others are zero and not read.
  static V load_first(const float* p, int64_t n) {
    return (V)_mm512_maskz_loadu_ps(static_cast<__mmask16>(0xffff >> (kLanes - n)), p);
  }

  // The sum over the lanes of each of four vectors.
  static void lane_sums(const V* v, float* sums) {
    __m256 halves[4];
    for (int i = 0; i < 4; ++i)
      halves[i] =
          _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]), _mm512_extractf32x8_ps((__m512)v[i], 1));
    const __m256 a = _mm256_hadd_ps(halves[0], halves[1]), b = _mm256_hadd_ps(halves[2], halves[3]);
    const __m256 quarters = _mm256_hadd_ps(a, b);
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1)));
  }

  static void transpose(V (&rows)[kLanes]) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
      a[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
      a[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
      b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
      b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
      b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
      a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
      a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
      a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
      rows[i] = (V)_mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
      rows[i + 8] = (V)_mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
    }
  }
};
