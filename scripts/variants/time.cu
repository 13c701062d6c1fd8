// Times the variants that variants.py compiled in, in turns, in plain launches, one behind another: no JAX, graph or pause, so that a long case runs at the
// card's power limit. Outputs of a case are compared with those of the first variant. Median µs a call, and the clock that SMs really had meanwhile: NVML lags
// by more than a short case takes.
//
//   time [--rounds 9] [--ms 15] [CASE ...]     dense_decode:b,s_q,h_q,s_k[,in_order]  sparse_decode:b,s_q,h_q,s_k,topk  sparse_prefill:s_q,s_kv,topk,d_qk,h_q
//
// Cases are named as in `python -m jax_flashmla.bench`; lengths are equal, pages have 64 tokens and are anywhere, or one behind the other (in_order). After
// each case: the largest difference of an output, and MHz.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "params.h"

using namespace jax_flashmla;

using Call = const char* (*)(const void*);
enum Op { kPlan, kDense, kSparse, kPrefill };
#define DECLARE(name) extern "C" const Call name[4];
#define ENTRY(name) {#name, name},
VARIANTS(DECLARE)
static const struct Variant {
  const char* name;
  const Call* calls;
} kVariants[] = {VARIANTS(ENTRY)};

static void check(cudaError_t error, int line) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "time.cu:%d: %s\n", line, cudaGetErrorString(error));
  exit(1);
}
#define CHECK(call) check(call, __LINE__)
static void check(const char* error) {
  if (!error) return;
  fprintf(stderr, "launch: %s\n", error);
  exit(1);
}

// ---- inputs ---------------------------------------------------------------------------------------------------------------------------------------

__device__ uint32_t hash(uint64_t x) {
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ull;
  return uint32_t(x >> 32);
}
__device__ float normal(uint64_t i) { return sqrtf(-2 * logf((hash(2 * i) + 1.f) / 4294967808.f)) * cospif(2 * (hash(2 * i + 1) / 4294967296.f)); }

#define FOR_EACH(i, n) for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < (n); i += int64_t(gridDim.x) * blockDim.x)

__global__ void fill_normal(__nv_bfloat16* x, int64_t n, uint64_t seed) { FOR_EACH(i, n) x[i] = __float2bfloat16(normal(i + (seed << 40))); }

// Rows of fp8_v32: codes of normal numbers, rounded down, with a scale of 2^-7.
__global__ void fill_rows(char* rows, int64_t tokens) {
  using R = Fp8Layout<KVFormat::kFp8V32>;
  FOR_EACH(i, tokens * R::kLatent) {
    const float x = normal(i) * 100, size = fminf(fabsf(x), 448.f);
    int exponent;
    const float fraction = frexpf(size, &exponent);
    const int code = size < 0.015625f ? 0 : (exponent + 6) << 3 | int((2 * fraction - 1) * 8);
    rows[i / R::kLatent * R::kRow + i % R::kLatent] = char(code | (x < 0) << 7);
  }
  FOR_EACH(i, tokens * 64) reinterpret_cast<__nv_bfloat16*>(rows + i / 64 * R::kRow + R::kRope)[i % 64] = __float2bfloat16(normal(i + (1ull << 50)));
  FOR_EACH(i, tokens * 4) reinterpret_cast<float*>(rows + i / 4 * R::kRow + R::kScale)[i % 4] = 1.f / 128;
}

// Lists of topk slots each, of `range` from `step` times the number of the list's sequence on.
__global__ void fill_indices(int* indices, int64_t lists, int topk, int lists_of_sequence, int step, int range, uint64_t seed) {
  FOR_EACH(i, lists * topk) indices[i] = int(i / topk / lists_of_sequence * step + hash(i + (seed << 40)) % uint32_t(range));
}

// Clocks and nanoseconds so far, of every SM that gets a CTA. Numbers of SMs may have gaps: those beyond the last place are left out.
struct Clock {
  int64_t clocks, ns;
};
__global__ void read_clocks(Clock* of_sm, int sms) {
  int sm;
  Clock now;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(now.clocks));
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now.ns));
  if (sm < sms) of_sm[sm] = now;
}

class Buffers {
 public:
  ~Buffers() {
    for (void* p : all_) cudaFree(p);
  }
  template <class T>
  T* make(int64_t n) {
    void* p;
    CHECK(cudaMalloc(&p, n * sizeof(T)));
    all_.push_back(p);
    return static_cast<T*>(p);
  }
  template <class T>
  T* copy(const std::vector<T>& from) {
    T* to = make<T>(from.size());
    CHECK(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
    return to;
  }

 private:
  std::vector<void*> all_;
};

// ---- a case ---------------------------------------------------------------------------------------------------------------------------------------

struct Case {
  Op op;
  int b, s_q, h_q, s_k, topk, d_qk;  // prefill: b query tokens of one sequence
  bool in_order;
  int sequences() const { return op == kDense ? b : b * s_q; }
  int rows() const { return op == kDense ? s_q * h_q : h_q; }
  int keys() const { return op == kDense ? s_k : topk; }
};

static Case parse(const char* text) {
  Case c{kDense, 1, 1, 0, 0, 0, 576, strstr(text, ",in_order") != nullptr};
  if (sscanf(text, "dense_decode:%d,%d,%d,%d", &c.b, &c.s_q, &c.h_q, &c.s_k) == 4) return c;
  c.op = kSparse;
  if (sscanf(text, "sparse_decode:%d,%d,%d,%d,%d", &c.b, &c.s_q, &c.h_q, &c.s_k, &c.topk) == 5) return c;
  c.op = kPrefill, c.s_q = 1;
  if (sscanf(text, "sparse_prefill:%d,%d,%d,%d,%d", &c.b, &c.s_k, &c.topk, &c.d_qk, &c.h_q) == 5) return c;
  fprintf(stderr, "no case: %s\n", text);
  exit(2);
}

constexpr int kBlocks = 4096, kThreads = 256, kMostQuerySets = 128;
constexpr int64_t kRotated = 400 << 20;  // bytes of keys, and of queries if so many sets will do, that calls rotate over: eight times the L2 cache

struct Timing {
  double us, difference, mhz;
};

static std::vector<Timing> run(const Case& c, int rounds, double ms) {
  const int n = sizeof(kVariants) / sizeof(kVariants[0]), sequences = c.sequences(), rows = c.rows();
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  Buffers buffers;
  SparsePrefillParams sparse{};
  DenseDecodeParams dense{};
  DecodeParams& p = c.op == kDense ? static_cast<DecodeParams&>(dense) : sparse;

  int sms;
  CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  const int tiles = (rows + kRowTile - 1) / kRowTile, parts = std::max(1, sms / tiles), slots = std::max(1, parts - 1 + std::min(sequences, parts - 1));
  const int64_t all_rows = int64_t(sequences) * rows;
  const int query_sets = int(std::clamp<int64_t>(kRotated / (2 * all_rows * c.d_qk), 4, kMostQuerySets));
  auto* q = buffers.make<__nv_bfloat16>(query_sets * all_rows * c.d_qk);
  fill_normal<<<kBlocks, kThreads>>>(q, query_sets * all_rows * c.d_qk, 1);
  p.out = buffers.make<__nv_bfloat16>(all_rows * kDv);
  p.lse = buffers.make<float>(all_rows);
  p.partial_out = buffers.make<__nv_bfloat16>(int64_t(slots) * ((rows + 15) / 16 * 16) * kDv);
  p.partial_stats = buffers.make<float>(int64_t(slots) * rows * 4);
  p.b = sequences, p.s_q = c.op == kDense ? c.s_q : 1, p.h_q = c.h_q, p.h_kv = 1, p.group = c.h_q, p.rows = rows, p.d_qk = c.d_qk;
  p.max_len = (c.keys() + kBlockTokens - 1) / kBlockTokens * kBlockTokens;
  p.num_parts = parts, p.slots = slots, p.softmax_scale = 1 / std::sqrt(float(c.d_qk)), p.causal = p.s_q > 1, p.dtype = Dtype::kBF16, p.stream = stream;
  int* lengths = buffers.copy(std::vector<int>(sequences, c.keys()));

  // Sets of keys, or of lists, over which calls rotate.
  int* entries;  // block tables or lists
  int64_t entries_of_set;
  int sets;
  if (c.op == kDense) {
    dense.page_size = 64, dense.max_pages = p.max_len / 64;
    entries_of_set = int64_t(c.b) * dense.max_pages;
    const int64_t numbers = entries_of_set * 64 * c.d_qk;
    sets = int(std::max<int64_t>(1, kRotated / (2 * numbers)));
    auto* cache = buffers.make<__nv_bfloat16>(sets * numbers);
    fill_normal<<<kBlocks, kThreads>>>(cache, sets * numbers, 2);
    std::vector<int> pages(sets * entries_of_set);
    for (size_t i = 0; i < pages.size(); ++i) pages[i] = int(i);
    if (!c.in_order) std::shuffle(pages.begin(), pages.end(), std::mt19937(0));
    entries = buffers.copy(pages);
    dense.k_cache = cache, dense.num_pages = int(pages.size()), dense.cache_seqlens = lengths;
  } else {
    const bool fp8 = c.op == kSparse;
    const int64_t tokens = fp8 ? int64_t(c.b) * c.s_k : c.s_k, row = fp8 ? Fp8Layout<KVFormat::kFp8V32>::kRow : 2 * c.d_qk;
    entries_of_set = int64_t(sequences) * c.topk;
    sets = fp8 ? int(std::max<int64_t>(4, kRotated / (entries_of_set * row))) : 3;
    auto* cache = buffers.make<char>(tokens * row);
    if (fp8)
      fill_rows<<<kBlocks, kThreads>>>(cache, tokens);
    else
      fill_normal<<<kBlocks, kThreads>>>(reinterpret_cast<__nv_bfloat16*>(cache), tokens * c.d_qk, 2);
    entries = buffers.make<int>(sets * entries_of_set);
    for (int i = 0; i < sets; ++i) fill_indices<<<kBlocks, kThreads>>>(entries + i * entries_of_set, sequences, c.topk, c.s_q, fp8 ? c.s_k : 0, c.s_k, 3 + i);
    SparseSource& source = sparse.sources[0];
    source.cache = cache, source.slots = tokens, source.topk = c.topk, source.page_size = 64, source.page_bytes = 64 * row;
    sparse.format = fp8 ? KVFormat::kFp8V32 : KVFormat::kPlain, sparse.tokens = fp8 ? c.s_q : 1, sparse.heads_kv = 1;
    sparse.max_logits = buffers.make<float>(all_rows), sparse.partial_max = buffers.make<float>(int64_t(slots) * rows);
  }
  CHECK(cudaDeviceSynchronize());

  // Every variant has its own plan. Where the sparse ops split nothing they take no num_splits.
  std::vector<const Part*> plans(n);
  std::vector<const int*> splits(n);
  for (int v = 0; v < n; ++v) {
    auto* metadata = buffers.make<Part>(parts);
    auto* num_splits = buffers.make<int>(sequences + 1);
    const ScheduleParams s{lengths, metadata, num_splits, 1, sequences, parts, tiles, false, c.op == kDense, stream};
    check(kVariants[v].calls[kPlan](&s));
    int all = 0;
    CHECK(cudaMemcpyAsync(&all, num_splits + sequences, sizeof(int), cudaMemcpyDeviceToHost, stream));
    CHECK(cudaStreamSynchronize(stream));
    plans[v] = metadata, splits[v] = c.op == kDense || all ? num_splits : nullptr;
  }
  auto call = [&](int v, int i) {
    p.metadata = plans[v], p.num_splits = splits[v], p.q = q + i % query_sets * all_rows * c.d_qk;
    (c.op == kDense ? dense.block_table : sparse.sources[0].indices) = entries + i % sets * entries_of_set;
    check(kVariants[v].calls[c.op](c.op == kDense    ? static_cast<const void*>(&dense)
                                   : c.op == kSparse ? static_cast<const void*>(static_cast<const SparseDecodeParams*>(&sparse))
                                                     : &sparse));
  };

  std::vector<Timing> results(n);
  std::vector<__nv_bfloat16> first(std::min<int64_t>(all_rows, 4096) * kDv), out(first.size());
  for (int v = 0; v < n; ++v) {
    CHECK(cudaMemsetAsync(p.out, 0xFF, all_rows * kDv * sizeof(__nv_bfloat16), stream));  // NaN
    call(v, 1);
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(out.data(), p.out, out.size() * sizeof(__nv_bfloat16), cudaMemcpyDeviceToHost));
    if (v == 0) first = out;
    for (size_t i = 0; i < out.size(); ++i) {
      const double difference = std::fabs(double(__bfloat162float(out[i])) - double(__bfloat162float(first[i])));
      if (std::isnan(difference) || difference > results[v].difference) results[v].difference = difference;  // NaN stays
    }
  }

  auto* clocks = buffers.make<Clock>(2 * sms);
  CHECK(cudaMemset(clocks, 0, 2 * sms * sizeof(Clock)));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  auto timed = [&](int v, int calls, int from) {
    for (int i = 0; i < 2; ++i) call(v, i);
    read_clocks<<<sms, 1, 0, stream>>>(clocks, sms);
    CHECK(cudaEventRecord(begin, stream));
    for (int i = 0; i < calls; ++i) call(v, from + i);
    CHECK(cudaEventRecord(end, stream));
    read_clocks<<<sms, 1, 0, stream>>>(clocks + sms, sms);
    CHECK(cudaEventSynchronize(end));
    float elapsed;
    CHECK(cudaEventElapsedTime(&elapsed, begin, end));
    return 1000. * elapsed / calls;
  };
  const int calls = std::max(4, int(1000 * ms / timed(0, 4, 0)));
  auto megahertz = [&] {
    std::vector<Clock> all(2 * sms);
    CHECK(cudaMemcpyAsync(all.data(), clocks, all.size() * sizeof(Clock), cudaMemcpyDeviceToHost, stream));
    CHECK(cudaStreamSynchronize(stream));
    double sum = 0;
    int seen = 0;
    for (int i = 0; i < sms; ++i)
      if (all[i].ns && all[sms + i].ns > all[i].ns) sum += 1e3 * double(all[sms + i].clocks - all[i].clocks) / double(all[sms + i].ns - all[i].ns), ++seen;
    return seen ? sum / seen : 0.;
  };
  std::vector<std::vector<double>> us(n);
  for (int round = 0; round < rounds; ++round)
    for (int turn = 0; turn < n; ++turn) {
      const int v = (round + (round % 2 ? n - turn : turn)) % n;  // not always behind the same one, whose heat it inherits
      us[v].push_back(timed(v, calls, round));
      results[v].mhz += megahertz() / rounds;
    }
  for (int v = 0; v < n; ++v) {
    std::sort(us[v].begin(), us[v].end());
    results[v].us = us[v][rounds / 2];
  }
  cudaEventDestroy(begin), cudaEventDestroy(end), cudaStreamDestroy(stream);
  return results;
}

int main(int argc, char** argv) {
  int rounds = 9;
  double ms = 15;
  std::vector<const char*> names;
  for (int i = 1; i < argc; ++i) {
    if (!strcmp(argv[i], "--rounds") && i + 1 < argc)
      rounds = std::max(1, atoi(argv[++i]));
    else if (!strcmp(argv[i], "--ms") && i + 1 < argc)
      ms = atof(argv[++i]);
    else
      names.push_back(argv[i]);
  }
  if (names.empty())
    names = {"dense_decode:1,1,16,4096",
             "dense_decode:16,1,16,4096",
             "dense_decode:128,1,16,4096",
             "dense_decode:128,1,64,16384",
             "dense_decode:128,1,128,16384",
             "dense_decode:128,2,128,8192",
             "sparse_decode:1,1,64,32768,2048",
             "sparse_decode:128,1,64,32768,2048",
             "sparse_decode:128,1,128,32768,2048",
             "sparse_prefill:4096,8192,2048,576,128",
             "sparse_prefill:4096,65536,2048,576,64",
             "sparse_prefill:4096,65536,512,512,128"};
  std::vector<Case> cases;
  for (const char* name : names) cases.push_back(parse(name));
  printf("%-40s", "case");
  for (const Variant& v : kVariants) printf("%12s", v.name);
  printf("   difference, MHz\n");
  for (size_t i = 0; i < cases.size(); ++i) {
    const std::vector<Timing> results = run(cases[i], rounds, ms);
    printf("%-40s", names[i]);
    for (const Timing& r : results) printf("%12.1f", r.us);
    printf("  ");
    for (size_t v = 1; v < results.size(); ++v) printf(" %.1e", results[v].difference);
    for (const Timing& r : results) printf(" %.0f", r.mhz);
    printf("\n");
    fflush(stdout);
  }
}
