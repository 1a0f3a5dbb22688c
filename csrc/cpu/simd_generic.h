// 128-bit vectors in the compiler's own notation: SSE2 on x86-64, NEON on AArch64.
// Included inside the namespace of one instruction set; see kernels.h.

struct Simd {
  static constexpr int kLanes = 4;
  static constexpr int kAccumulators = 12;  // registers that hold one
  static constexpr int64_t kStreamedRows = 12;
  // Tiles of dot products: columns, and with integers the sums of one plane of a tile.
  static constexpr int kDotColumns = 4, kDotSteps = 1, kIntegerColumns = 3, kIntegerSums = 9;
  static constexpr bool kWidensPanelsOnce = true;
  static constexpr bool kPrefetchesColumns = false;  // the next ones of such a tile
  static constexpr int64_t kTileAheadInL1 = 0;       // of panels, beside few rows; bytes, 0: not
  static constexpr bool kBf16Dot = false;            // multiplies bf16 pairs directly
  typedef float V __attribute__((vector_size(16)));
  typedef int32_t VI __attribute__((vector_size(16)));

  static void free_other_registers() {}  // so few leave none for other uses

  static V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
  // There is no portable way past the caches.
  static void stream(void* p, V v) { store(p, v); }
  static void stream_low_halves(void* p, VI v) { store_low_halves(static_cast<uint16_t*>(p), v); }
  static void end_stream() {}
  static V broadcast(float x) { return V{x, x, x, x}; }
  static V multiply_add(V a, V b, V c) { return a * b + c; }

  static V load_bf16(const uint16_t* p) {
    const VI bits = {p[0] << 16, p[1] << 16, p[2] << 16, p[3] << 16};
    return (V)bits;
  }
  static V load_f16(const uint16_t* p) {
    return V{f16_to_float(p[0]), f16_to_float(p[1]), f16_to_float(p[2]), f16_to_float(p[3])};
  }
  // Two vectors; fp8 e4m3 times 2^-8, the value of fp16 of the same bits.
  static void load_int8(const int8_t* p, V (&two)[2]) {
    for (int i = 0; i < 2 * kLanes; ++i) two[i / kLanes][i % kLanes] = static_cast<float>(p[i]);
  }
  static void load_fp8(const uint8_t* p, V (&two)[2]) {
    for (int i = 0; i < 2 * kLanes; ++i) two[i / kLanes][i % kLanes] = f16_to_float(fp8_to_half(p[i]));
  }
  // Vectors of twice kLanes int16.
  typedef int16_t VH __attribute__((vector_size(16)));
  static VI widen_int8(const int8_t* p) {
    VH halves;
    for (int i = 0; i < 2 * kLanes; ++i) halves[i] = p[i];
    return (VI)halves;
  }
  // Of two rows of kPanelColumns int8, one after the other, vector v of the pairs in their columns.
  static VI pair_int8(const int8_t* rows, int v) {
    VH halves;
    for (int i = 0; i < 2 * kLanes; ++i) halves[i] = rows[i % 2 * kPanelColumns + v * kLanes + i / 2];
    return (VI)halves;
  }
  static VI widen_int4(const int32_t* run, int v) {
    const VH halves = (VH)load(run + v % 2 * kLanes);
    return (VI)(halves << (12 - v / 2 * 4) >> 12);
  }
  // Adds the products of neighbouring pairs.
  static VI multiply_add_int16(VI a, VI b, VI c) {
    for (int i = 0; i < kLanes; ++i)
      c[i] += ((VH)a)[2 * i] * ((VH)b)[2 * i] + ((VH)a)[2 * i + 1] * ((VH)b)[2 * i + 1];
    return c;
  }
  static void store_low_halves(uint16_t* p, VI v) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint16_t>(v[i]);
  }
  static void store_f16(uint16_t* p, V v) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_f16(v[i]);
  }

  // The first n floats, 1 <= n <= kLanes; the others are zero and not read.
  static V load_first(const float* p, int64_t n) {
    V v = {};
    std::memcpy(&v, p, n * sizeof(float));
    return v;
  }

  // The sum over the lanes of each of four vectors.
  static void lane_sums(const V* v, float* sums) {
    V rows[4] = {v[0], v[1], v[2], v[3]};
    transpose(rows);
    store(sums, (rows[0] + rows[1]) + (rows[2] + rows[3]));
  }

  static void transpose(V (&rows)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = i + 1; j < kLanes; ++j) {
        const float x = rows[i][j];
        rows[i][j] = rows[j][i];
        rows[j][i] = x;
      }
    }
  }
};
