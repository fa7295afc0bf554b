// What the token loop reads much for and computes little with, for XLA's CPU backend: products of a few rows with a
// matrix of 8, 16 or 32 bits, and attention of a few queries. Numbers are widened as they are read; sums are float32.
// __init__.py says what each handler computes, and which shapes it takes.
#ifdef __AVX512F__
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
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kLanes = 16;
#define VECTOR(type, lanes) type __attribute__((vector_size(lanes * sizeof(type)), aligned(sizeof(type)), may_alias))
typedef VECTOR(float, kLanes) Vec;
typedef VECTOR(int32_t, kLanes) Ints;
typedef VECTOR(uint16_t, kLanes) Halves;
typedef VECTOR(int8_t, kLanes) Bytes;
using BFloat16 = uint16_t;

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline Vec load(const int8_t* p) {
#ifdef __AVX512F__
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#endif
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Ints), Vec);
}
inline Vec load(const BFloat16* p) {  // the upper half of a float32
#ifdef __AVX512F__
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#endif
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Ints) << 16);
}
inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }

inline float sum(Vec x) {
  typedef VECTOR(float, 8) Half;
  typedef VECTOR(float, 4) Quarter;
  Half half = ((Half*)&x)[0] + ((Half*)&x)[1];
  Quarter quarter = ((Quarter*)&half)[0] + ((Quarter*)&half)[1];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
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

// y[r][n] = x[r] . table[n] for R rows of x [R,K] and N of the table.
template <int R, int N, typename T>
void dots(const float* x, const T* table, float* y, int64_t k_size, int64_t y_stride) {
  Vec sums[R][N] = {};
  for (int64_t k = 0; k < k_size; k += kLanes) {
    Vec entries[N];
    for (int n = 0; n < N; ++n) {
      entries[n] = load(table + n * k_size + k);
      __builtin_prefetch(table + (n + 2 * N) * k_size + k);
    }
    for (int r = 0; r < R; ++r) {
      Vec row = load(x + r * k_size + k);
      for (int n = 0; n < N; ++n) sums[r][n] += row * entries[n];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) y[r * y_stride + n] = sum(sums[r][n]);
}

template <int R, typename T>
void rows_by_table(const float* x, const T* table, float* y, int64_t k_size, int64_t n_size, int64_t y_stride) {
  int64_t n = 0;
  for (; n + 4 <= n_size; n += 4) dots<R, 4>(x, table + n * k_size, y + n, k_size, y_stride);
  for (; n < n_size; ++n) dots<R, 1>(x, table + n * k_size, y + n, k_size, y_stride);
}

// y [R,N] = x [R,K] table [N,K]^T.
template <typename T>
void by_table(const float* x, const T* table, float* y, int64_t rows, int64_t k_size, int64_t n_size,
              int64_t y_stride) {
  for (; rows > 0; rows -= 5, x += 5 * k_size, y += 5 * y_stride) {
    switch (rows) {
      case 1: rows_by_table<1>(x, table, y, k_size, n_size, y_stride); break;
      case 2: rows_by_table<2>(x, table, y, k_size, n_size, y_stride); break;
      case 3: rows_by_table<3>(x, table, y, k_size, n_size, y_stride); break;
      case 4: rows_by_table<4>(x, table, y, k_size, n_size, y_stride); break;
      default: rows_by_table<5>(x, table, y, k_size, n_size, y_stride);
    }
  }
}

// y[r] = sum over k of x[r][k] w[k], for R rows and C vectors of columns of w [K,N].
template <int R, int C, typename T>
void columns(const float* x, const T* w, float* y, int64_t k_size, int64_t n_size) {
  Vec sums[R][C] = {};
  for (int64_t k = 0; k < k_size; ++k) {
    Vec entries[C];
    for (int c = 0; c < C; ++c) entries[c] = load(w + k * n_size + c * kLanes);
    __builtin_prefetch(w + (k + 16) * n_size);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sums[r][c] += x[r * k_size + k] * entries[c];
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(y + r * n_size + c * kLanes, sums[r][c]);
}

template <int C, typename T>
void by_matrix(const float* x, const T* w, float* y, int64_t rows, int64_t k_size, int64_t n_size) {
  for (; rows > 0; rows -= 5, x += 5 * k_size, y += 5 * n_size) {
    switch (rows) {
      case 1: columns<1, C>(x, w, y, k_size, n_size); break;
      case 2: columns<2, C>(x, w, y, k_size, n_size); break;
      case 3: columns<3, C>(x, w, y, k_size, n_size); break;
      case 4: columns<4, C>(x, w, y, k_size, n_size); break;
      default: columns<5, C>(x, w, y, k_size, n_size);
    }
  }
}

// One head: q [S,K] attends to k and v [T,K] -> out [S,K]. T is at least 1.
template <typename T>
void attend(const float* q, const T* k, const T* v, float* out, int64_t s_size, int64_t t_size, int64_t width) {
  static thread_local std::vector<float> scores;
  const int64_t padded = (t_size + kLanes - 1) / kLanes * kLanes;
  scores.resize(s_size * padded);
  for (int64_t t = 0; t < t_size; t += 64)  // which stay in the first cache for all queries
    by_table(q, k + t * width, scores.data() + t, s_size, width, std::min<int64_t>(64, t_size - t), padded);
  for (int64_t s = 0; s < s_size; ++s) {
    float* row = scores.data() + s * padded;
    std::fill(row + t_size, row + padded, -std::numeric_limits<float>::infinity());
    Vec top = load(row), total = {};
    for (int64_t t = 0; t < padded; t += kLanes) top = load(row + t) > top ? load(row + t) : top;
    float highest = top[0];
    for (int i = 1; i < kLanes; ++i) highest = std::max(highest, top[i]);
    for (int64_t t = 0; t < padded; t += kLanes) {
      Vec part = exponential(load(row + t) - highest);
      store(row + t, part);
      total += part;
    }
    float share = 1 / sum(total);
    for (int64_t t = 0; t < padded; t += kLanes) store(row + t, load(row + t) * share);
  }
  for (int64_t s = 0; s < s_size; ++s) {
    const float* row = scores.data() + s * padded;
    for (int64_t c = 0; c < width; c += 4 * kLanes) {
      Vec sums[2][4] = {};
      for (int64_t t = 0; t < t_size; ++t)
        for (int i = 0; i < 4; ++i) sums[t % 2][i] += row[t] * load(v + t * width + c + i * kLanes);
      for (int i = 0; i < 4; ++i) store(out + s * width + c + i * kLanes, sums[0][i] + sums[1][i]);
    }
  }
}

template <typename T>
void table_product(ffi::ThreadPool& pool, const float* x, const T* table, float* y, int64_t rows, int64_t k,
                   int64_t n) {
  constexpr int64_t kPiece = 64;  // entries that stay in the first cache for all rows
  int64_t pieces = (n + kPiece - 1) / kPiece, share = std::max<int64_t>(1, pieces / 32);
  for_each(pool, (pieces + share - 1) / share, rows * k * n, [=](int64_t i) {
    for (int64_t at = i * share * kPiece; at < std::min(n, (i + 1) * share * kPiece); at += kPiece)
      by_table(x, table + at * k, y + at, rows, k, std::min(kPiece, n - at), n);
  });
}

template <typename T>
void layer_product(ffi::ThreadPool& pool, const float* x, const T* w, float* y, int64_t rows, int64_t k, int64_t n) {
  constexpr int64_t kPiece = 4 * kLanes;
  for_each(pool, n / kPiece, rows * k * n,
           [=](int64_t i) { by_matrix<4>(x, w + i * kPiece, y + i * kPiece, rows, k, n); });
}

template <typename T>
void attention(ffi::ThreadPool& pool, const float* q, const T* k, const T* v, const int32_t* lengths, float* out,
               int64_t heads, int64_t s, int64_t t, int64_t width) {
  int64_t longest = *std::max_element(lengths, lengths + heads);
  for_each(pool, heads, heads * s * longest * width, [=](int64_t i) {
    int64_t length = std::clamp<int64_t>(lengths[i], 1, t);
    attend(q + i * s * width, k + i * t * width, v + i * t * width, out + i * s * width, s, length, width);
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
