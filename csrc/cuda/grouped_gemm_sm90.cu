// Which weights the tensor copies can read, the choice of a tile, and the kernels of bf16.
#include <algorithm>
#include <numeric>

#include "cuda/grouped_gemm_sm90.cuh"

namespace paddle_moe {
namespace cuda {
namespace {

// False where tensor copies cannot read them: their addresses and strides are multiples of 16 bytes.
bool describe(const std::vector<Expert>& experts, Matrix Expert::* member, Weights* weights) {
  constexpr int64_t kElement = 2, kAlignment = 16, kMaxStride = int64_t{1} << 40,
                    kMaxPlace = int64_t{1} << 31;
  const Matrix& first = experts.front().*member;
  auto address = [](const Matrix& m) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(m.data)); };
  weights->order = first.out_stride == 1 ? WeightOrder::kInOut : WeightOrder::kOutIn;
  if (weights->order == WeightOrder::kOutIn && first.in_stride != 1) return false;
  const int64_t row = kElement * (weights->order == WeightOrder::kInOut ? first.in_stride : first.out_stride);
  int64_t base = address(first), last = base;
  for (const Expert& expert : experts) {
    const Matrix& m = expert.*member;
    if (m.in_stride != first.in_stride || m.out_stride != first.out_stride) return false;
    base = std::min(base, address(m));
    last = std::max(last, address(m));
  }
  int64_t granularity = 0;
  for (const Expert& expert : experts) granularity = std::gcd(granularity, address(expert.*member) - base);
  if (granularity == 0) granularity = kAlignment;  // one expert, or all the same
  if (base % kAlignment != 0 || granularity % kAlignment != 0 || granularity >= kMaxStride) return false;
  if (row <= 0 || row % kAlignment != 0 || row >= kMaxStride) return false;
  if ((last - base) / granularity >= kMaxPlace) return false;
  weights->map = {reinterpret_cast<const char*>(base), granularity};
  weights->row_bytes = row;
  weights->places = (last - base) / granularity + 1;
  return true;
}

bool encode(const Weights& weights, int64_t in, int64_t out, TensorMap* map) {
  const bool in_out = weights.order == WeightOrder::kInOut;
  const uint64_t sizes[3] = {static_cast<uint64_t>(in_out ? out : in),
                             static_cast<uint64_t>(in_out ? in : out), weights.places};
  // Without a second place its distance means nothing, but has to be one that the driver takes.
  const uint64_t strides[2] = {weights.row_bytes, weights.places == 1
                                                      ? weights.row_bytes * sizes[1]
                                                      : static_cast<uint64_t>(weights.map.granularity)};
  static_assert(kDepth == kBlockColumns, "a box is as wide as high, whichever index is contiguous");
  return encode_tensor_map(map, weights.map.base, sizes, strides, kDepth, kBlockColumns);
}

bool prepare(Stage stage, const Problem& p, const GroupedGemm& gemm, GemmWeights* w) {
  const bool gated = stage == Stage::kGateUp, has_up = gated || gemm.parts == 2;
  return describe(p.experts, gated ? &Expert::gate : &Expert::down, &w->first) &&
         describe(p.experts, has_up ? &Expert::up : &Expert::down, &w->up) && w->first.order == w->up.order &&
         encode(w->first, gemm.depth, gemm.columns, &w->first_map) &&
         encode(w->up, gemm.depth, gemm.columns, &w->up_map);
}

}  // namespace

bool accepts_sm90(const Problem& p) {
  if (p.experts.empty() || dtype_size(p.dtype) != 2) return false;
  if (p.hidden_size % kChunk != 0 || p.intermediate_size % kChunk != 0) return false;
  if (!is_aligned(p.hidden_states, p.hidden_states_stride)) return false;
  GemmWeights weights;
  GroupedGemm gate_up, down;
  gate_up.depth = down.columns = p.hidden_size;
  gate_up.columns = down.depth = p.intermediate_size;
  return prepare(Stage::kGateUp, p, gate_up, &weights) && prepare(Stage::kDown, p, down, &weights);
}

// With fewer rows per expert than this the weights' way through memory takes longer than the products of 64
// rows, so smaller tiles cost nothing.
int block_m_sm90(const Problem& p, int64_t num_tokens) {
  return num_tokens * p.top_k < 64 * p.num_experts() ? 64 : 128;
}

void grouped_gemm_sm90(Stage stage, const Problem& p, const GroupedGemm& gemm, Stream stream) {
  GemmWeights weights;
  if (!prepare(stage, p, gemm, &weights)) {
    throw std::runtime_error("grouped_gemm_sm90: the weights cannot be read by tensor copies");
  }
  if (p.dtype == DType::kBFloat16) {
    run<Bf16>(stage, gemm, weights, stream);
  } else {
    grouped_gemm_fp16_sm90(stage, gemm, weights, stream);
  }
}

}  // namespace cuda
}  // namespace paddle_moe
