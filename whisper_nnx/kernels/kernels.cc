// For XLA's CPU backend: what the token loop reads much for and computes little with (products of a few rows with a
// matrix of 8, 16 or 32 bits), and attention. Numbers are widened as they are read; sums are float32.
// __init__.py says what each handler computes, and which shapes it takes.
#ifdef __AVX__
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// What a register holds, and how many of them a tile of sums may take with what is multiplied (see `dots`, `columns`).
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kDotRows = 6, kColumns = 4;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8, kDotRows = 2, kColumns = 2;
#elif defined(__aarch64__)
constexpr int64_t kLanes = 4, kDotRows = 6, kColumns = 4;
#else
constexpr int64_t kLanes = 4, kDotRows = 2, kColumns = 2;
#endif
constexpr int64_t kColumnRows = 6, kEntries = 4;
constexpr int64_t kBlock = 64;  // columns of a matrix, or keys, that are worked on together

#define VECTOR(type, lanes) type __attribute__((vector_size(lanes * sizeof(type)), aligned(sizeof(type)), may_alias))
typedef VECTOR(float, kLanes) Vec;
typedef VECTOR(float, 8) Eight;
typedef VECTOR(float, 4) Four;
typedef VECTOR(int32_t, kLanes) Ints;
typedef VECTOR(uint16_t, kLanes) Halves;
typedef VECTOR(int8_t, kLanes) Bytes;
using BFloat16 = uint16_t;

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline Vec load(const int8_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#endif
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Ints), Vec);
}
inline Vec load(const BFloat16* p) {  // the upper half of a float32
#if defined(__AVX512F__)
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#endif
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Ints) << 16);
}
inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }

inline float sum(Vec x) {
  Four total = ((Four*)&x)[0];
  for (int i = 1; i < kLanes / 4; ++i) total += ((Four*)&x)[i];
  return (total[0] + total[2]) + (total[1] + total[3]);
}

// The sums of four vectors: faster than one by one.
inline Four sums(const Vec* x) {
#ifdef __AVX__
  auto eight = [](const Vec& x) {
    Eight total = ((Eight*)&x)[0];
    if constexpr (kLanes == 16) total += ((Eight*)&x)[1];
    return (__m256)total;
  };
  __m256 pairs = _mm256_hadd_ps(eight(x[0]), eight(x[1])), others = _mm256_hadd_ps(eight(x[2]), eight(x[3]));
  __m256 quads = _mm256_hadd_ps(pairs, others);
  return (Four)_mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1));
#endif
  return Four{sum(x[0]), sum(x[1]), sum(x[2]), sum(x[3])};
}

inline float highest(Vec x) {
  float top = x[0];
  for (int i = 1; i < kLanes; ++i) top = std::max(top, x[i]);
  return top;
}

// e^x for x <= 0, to 1e-7: 2^n e^r with |r| <= ln(2) / 2.
inline Vec exponential(Vec x) {
  x = x < -87.0f ? Vec{} - 87.0f : x;
  Vec shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // rounds
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = Vec{} + 1.0f / 5040;
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  return p * (Vec)((__builtin_convertvector(n, Ints) + 127) << 23);
}

// Calls work(i) for all i < n, on this thread and those of the pool that have time. Waking these takes longer than
// a few hundred thousand products (`cost`).
template <typename Work>
void for_each(ffi::ThreadPool& pool, int64_t n, int64_t cost, Work work) {
  if (cost < (1 << 18)) {
    for (int64_t i = 0; i < n; ++i) work(i);
    return;
  }
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable ended;
  };
  auto progress = std::make_shared<Progress>();  // a helper may come when all is done
  auto run = [progress, n, work] {
    int64_t did = 0;
    for (int64_t i; (i = progress->next.fetch_add(1)) < n; ++did) work(i);
    if (did && progress->done.fetch_add(did) + did == n) {
      std::lock_guard<std::mutex> lock(progress->mutex);
      progress->ended.notify_one();
    }
  };
  for (int64_t i = 1; i < std::min<int64_t>(pool.num_threads(), n); ++i) pool.Schedule(std::function<void()>(run));
  run();
  for (int spin = 0; spin < 20000 && progress->done.load() < n; ++spin) {
  }
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->ended.wait(lock, [&] { return progress->done.load() == n; });
}

// Calls work(n) with n as a constant, 1 to Most.
template <int Most, typename Work>
void with_constant(int64_t n, Work work) {
  if constexpr (Most > 1)
    if (n < Most) return with_constant<Most - 1>(n, work);
  work(std::integral_constant<int, Most>{});
}

// Calls work(R, first) for all rows, R at a time: a constant, Most or less, and about the same each time.
template <int Most, typename Work>
void in_tiles(int64_t rows, Work work) {
  const int64_t tiles = (rows + Most - 1) / Most, size = (rows + tiles - 1) / tiles;
  for (int64_t first = 0; first < rows; first += size)
    with_constant<Most>(std::min(size, rows - first), [&](auto tile) { work(tile, first); });
}

// y[r][n] = x[r] . table[n] for R rows of x [R,K] and N of the table.
template <int R, int N, typename T>
void dots(const float* x, const T* table, float* y, int64_t k_size, int64_t y_stride) {
  Vec parts[R][N] = {};
  for (int64_t k = 0; k < k_size; k += kLanes) {
    Vec entries[N];
    for (int n = 0; n < N; ++n) entries[n] = load(table + n * k_size + k);
    for (int r = 0; r < R; ++r) {
      Vec row = load(x + r * k_size + k);
      for (int n = 0; n < N; ++n) parts[r][n] += row * entries[n];
    }
  }
  for (int r = 0; r < R; ++r)
    if constexpr (N == kEntries) {
      *(Four*)(y + r * y_stride) = sums(parts[r]);
    } else {
      for (int n = 0; n < N; ++n) y[r * y_stride + n] = sum(parts[r][n]);
    }
}

// y [R,N] = x [R,K] table [N,K]^T. Meanwhile what lies `next` entries on is brought into the second cache.
template <typename T>
void by_table(const float* x, const T* table, float* y, int64_t rows, int64_t k_size, int64_t n_size,
              int64_t y_stride, int64_t next) {
  in_tiles<kDotRows>(rows, [=](auto tile, int64_t first) {
    constexpr int R = decltype(tile)::value;
    const int64_t from = kEntries * k_size * first / rows, to = kEntries * k_size * (first + R) / rows;
    int64_t n = 0;
    for (; n + kEntries <= n_size; n += kEntries) {
      for (int64_t i = from; i < to; i += 64 / sizeof(T)) __builtin_prefetch(table + (n + next) * k_size + i, 0, 2);
      dots<R, kEntries>(x + first * k_size, table + n * k_size, y + first * y_stride + n, k_size, y_stride);
    }
    for (; n < n_size; ++n)
      dots<R, 1>(x + first * k_size, table + n * k_size, y + first * y_stride + n, k_size, y_stride);
  });
}

// y[r] = sum over k of x[r][k] w[k], for R rows and a few columns of w [K,N].
template <int R, typename T>
void columns(const float* x, int64_t x_stride, const T* w, int64_t w_stride, float* y, int64_t y_stride,
             int64_t k_size) {
  Vec totals[R][kColumns] = {};
  for (int64_t k = 0; k < k_size; ++k, w += w_stride) {
    Vec entries[kColumns];
    for (int c = 0; c < kColumns; ++c) entries[c] = load(w + c * kLanes);
    for (int64_t i = 0; i < kColumns * kLanes; i += 64 / sizeof(T)) __builtin_prefetch(w + 8 * w_stride + i);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kColumns; ++c) totals[r][c] += x[r * x_stride + k] * entries[c];
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < kColumns; ++c) store(y + r * y_stride + c * kLanes, totals[r][c]);
}

// y [R,kBlock] = x [R,K] w [K,kBlock]; the strides are from row to row.
template <typename T>
void by_block(const float* x, int64_t x_stride, const T* w, int64_t w_stride, float* y, int64_t y_stride,
              int64_t rows, int64_t k_size) {
  in_tiles<kColumnRows>(rows, [=](auto tile, int64_t first) {
    for (int64_t c = 0; c < kBlock; c += kColumns * kLanes)
      columns<decltype(tile)::value>(x + first * x_stride, x_stride, w + c, w_stride, y + first * y_stride + c,
                                     y_stride, k_size);
  });
}

// Each row of x [R,N] becomes e^(x - its maximum); `shares` [R] are the reciprocals of their sums.
void exponentials(float* x, float* shares, int64_t rows, int64_t n_size) {
  for (int64_t r = 0; r < rows; ++r, x += n_size) {
    Vec top = load(x), total = {};
    for (int64_t n = 0; n < n_size; n += kLanes) top = load(x + n) > top ? load(x + n) : top;
    const float most = highest(top);
    for (int64_t n = 0; n < n_size; n += kLanes) {
      Vec part = exponential(load(x + n) - most);
      store(x + n, part);
      total += part;
    }
    shares[r] = 1 / sum(total);
  }
}

// One head: q [S,K] attends to k and v [T,K] -> out [S,K]. T is at least 1.
template <typename T>
void attend(const float* q, const T* k, const T* v, float* out, int64_t s_size, int64_t t_size, int64_t width) {
  constexpr int64_t kQueries = 48, kFew = 8;  // whose scores stay in the second cache; that do not pay to turn the keys
  static thread_local std::vector<float> scores, turned;
  const int64_t padded = (t_size + kBlock - 1) / kBlock * kBlock;
  scores.resize(std::min(kQueries, s_size) * padded);
  if (s_size > kFew) {  // the keys in blocks [K,kBlock]
    turned.resize(padded * width);
    for (int64_t t = 0; t < t_size; ++t)
      for (int64_t c = 0; c < width; c += kLanes) {
        Vec key = load(k + t * width + c);
        float* to = turned.data() + (t / kBlock * width + c) * kBlock + t % kBlock;
        for (int i = 0; i < kLanes; ++i) to[i * kBlock] = key[i];
      }
  }
  for (int64_t at = 0; at < s_size; at += kQueries, q += kQueries * width, out += kQueries * width) {
    const int64_t n = std::min(kQueries, s_size - at);
    float shares[kQueries];
    for (int64_t t = 0; t < t_size; t += kBlock)
      if (s_size > kFew)
        by_block(q, width, turned.data() + t * width, kBlock, scores.data() + t, padded, n, width);
      else
        by_table(q, k + t * width, scores.data() + t, n, width, std::min(kBlock, t_size - t), padded, kBlock);
    for (int64_t s = 0; s < n; ++s)
      std::fill_n(scores.data() + s * padded + t_size, padded - t_size, -std::numeric_limits<float>::infinity());
    exponentials(scores.data(), shares, n, padded);
    for (int64_t c = 0; c < width; c += kBlock)
      by_block(scores.data(), padded, v + c, width, out + c, width, n, t_size);
    for (int64_t i = 0; i < n * width; i += kLanes) store(out + i, load(out + i) * shares[i / width]);
  }
}

template <typename T>
void table_product(ffi::ThreadPool& pool, const float* x, const T* table, float* y, int64_t rows, int64_t k,
                   int64_t n) {
  constexpr int64_t kPiece = 32;  // entries that stay in the second cache for all rows, with those that come next
  int64_t pieces = (n + kPiece - 1) / kPiece, share = std::max<int64_t>(1, pieces / 32);
  for_each(pool, (pieces + share - 1) / share, rows * k * n, [=](int64_t i) {
    for (int64_t at = i * share * kPiece; at < std::min(n, (i + 1) * share * kPiece); at += kPiece)
      by_table(x, table + at * k, y + at, rows, k, std::min(kPiece, n - at), n, kPiece);
  });
}

template <typename T>
void layer_product(ffi::ThreadPool& pool, const float* x, const T* w, float* y, int64_t rows, int64_t k, int64_t n) {
  for_each(pool, n / kBlock, rows * k * n,
           [=](int64_t i) { by_block(x, k, w + i * kBlock, n, y + i * kBlock, n, rows, k); });
}

template <typename T>
void attention(ffi::ThreadPool& pool, const float* q, const T* k, const T* v, const int32_t* lengths, float* out,
               int64_t heads, int64_t s, int64_t t, int64_t width) {
  constexpr int64_t kPart = 384;  // queries of a head, for which its keys are turned once
  const int64_t parts = (s + kPart - 1) / kPart, longest = *std::max_element(lengths, lengths + heads);
  for_each(pool, heads * parts, heads * s * longest * width, [=](int64_t i) {
    int64_t head = i / parts, from = i % parts * kPart, at = (head * s + from) * width;
    attend(q + at, k + head * t * width, v + head * t * width, out + at, std::min(kPart, s - from),
           std::clamp<int64_t>(lengths[head], 1, t), width);
  });
}

template <typename Call>
ffi::Error by_type(ffi::DataType type, Call call) {
  switch (type) {
    case ffi::F32: call(float{}); return ffi::Error::Success();
    case ffi::BF16: call(BFloat16{}); return ffi::Error::Success();
    case ffi::S8: call(int8_t{}); return ffi::Error::Success();
    default: return ffi::Error::InvalidArgument("a matrix must be float32, bfloat16 or int8");
  }
}

using Floats = ffi::Buffer<ffi::F32>;
using Numbers = ffi::Buffer<ffi::S32>;

ffi::Error TableProduct(ffi::ThreadPool pool, Floats x, ffi::AnyBuffer table, ffi::Result<Floats> y) {
  int64_t rows = x.dimensions()[0], k = x.dimensions()[1], n = table.dimensions()[0];
  return by_type(table.element_type(), [&](auto kind) {
    using T = decltype(kind);
    table_product(pool, x.typed_data(), (const T*)table.untyped_data(), y->typed_data(), rows, k, n);
  });
}

ffi::Error LayerProduct(ffi::ThreadPool pool, Floats x, ffi::AnyBuffer w, ffi::Result<Floats> y) {
  int64_t rows = x.dimensions()[0], k = x.dimensions()[1], n = w.dimensions()[1];
  return by_type(w.element_type(), [&](auto kind) {
    using T = decltype(kind);
    layer_product(pool, x.typed_data(), (const T*)w.untyped_data(), y->typed_data(), rows, k, n);
  });
}

ffi::Error TableRows(ffi::ThreadPool, ffi::AnyBuffer table, Numbers ids, ffi::Result<Floats> out) {
  int64_t n = table.dimensions()[0], k = table.dimensions()[1];
  return by_type(table.element_type(), [&](auto kind) {
    using T = decltype(kind);
    for (size_t i = 0; i < ids.element_count(); ++i) {
      int64_t id = ids.typed_data()[i];
      float* to = out->typed_data() + i * k;
      bool known = 0 <= id && id < n;
      for (int64_t at = 0; at < k; at += kLanes)
        store(to + at, known ? load((const T*)table.untyped_data() + id * k + at) : Vec{} + NAN);
    }
  });
}

ffi::Error Attention(ffi::ThreadPool pool, Floats q, ffi::AnyBuffer k, ffi::AnyBuffer v, Numbers lengths,
                     ffi::Result<Floats> out) {
  auto size = q.dimensions();  // [heads,S,K]
  int64_t t = k.dimensions()[1];
  return by_type(k.element_type(), [&](auto kind) {
    using T = decltype(kind);
    attention(pool, q.typed_data(), (const T*)k.untyped_data(), (const T*)v.untyped_data(), lengths.typed_data(),
              out->typed_data(), size[0], size[1], t, size[2]);
  });
}

}  // namespace

#define HANDLER(function, arguments)                      \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(function##Handler, function, \
                                ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() arguments.Ret<Floats>())
HANDLER(TableProduct, .Arg<Floats>().Arg<ffi::AnyBuffer>());
HANDLER(LayerProduct, .Arg<Floats>().Arg<ffi::AnyBuffer>());
HANDLER(TableRows, .Arg<ffi::AnyBuffer>().Arg<Numbers>());
HANDLER(Attention, .Arg<Floats>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<Numbers>());
