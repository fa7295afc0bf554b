// Kernels for XLA's CPU backend: memory-bound matmuls of the token loop (a few rows times a matrix of 8, 16 or 32 bits),
// and attention. Numbers are converted to float32 as they are read; sums are float32.
// kernels.py documents what each handler computes, and the shapes it takes.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kColumnRows = 6, kEntries = 4;  // of a tile, see `columns` and `dots`
constexpr int64_t kBlock = 64;                    // columns of a matrix, or keys, that are processed together
constexpr double kFar = 1e30;                     // above the cost of any path

// Calls work(i) for all i < n, on this thread and idle threads of the pool. Waking these takes longer than a few
// hundred thousand multiplications (`cost`).
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
  auto progress = std::make_shared<Progress>();  // a helper may start when all is done
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

// y [R,N] = x [R,K] table [N,K]^T. Meanwhile the entries `next` further are prefetched into the second-level cache.
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
template <int R, typename X, typename T>
void columns(const X* x, int64_t x_stride, const T* w, int64_t w_stride, float* y, int64_t y_stride,
             int64_t k_size) {
  Vec totals[R][kColumns] = {};
  for (int64_t k = 0; k < k_size; ++k, w += w_stride) {
    decltype(load(w)) entries[kColumns];
    for (int c = 0; c < kColumns; ++c) entries[c] = load(w + c * kLanes);
    for (int64_t i = 0; i < kColumns * kLanes; i += 64 / sizeof(T)) __builtin_prefetch(w + 8 * w_stride + i);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kColumns; ++c) add_product(totals[r][c], x[r * x_stride + k], entries[c]);
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < kColumns; ++c) store(y + r * y_stride + c * kLanes, totals[r][c]);
}

// y [R,kBlock] = x [R,K] w [K,kBlock]; the strides are from row to row.
template <typename X, typename T>
void by_block(const X* x, int64_t x_stride, const T* w, int64_t w_stride, float* y, int64_t y_stride,
              int64_t rows, int64_t k_size) {
  in_tiles<kColumnRows>(rows, [=](auto tile, int64_t first) {
    for (int64_t c = 0; c < kBlock; c += kColumns * kLanes)
      columns<decltype(tile)::value>(x + first * x_stride, x_stride, w + c, w_stride, y + first * y_stride + c,
                                     y_stride, k_size);
  });
}

// Scores [R,N], of which the first T count, become e^(score - their maximum); `shares` [R]: 1 / their sum.
void to_weights(float* scores, float* shares, int64_t rows, int64_t t_size, int64_t n_size) {
  for (int64_t r = 0; r < rows; ++r, scores += n_size) {
    std::fill(scores + t_size, scores + n_size, -std::numeric_limits<float>::infinity());
    Vec top = load(scores), total = {};
    for (int64_t n = 0; n < n_size; n += kLanes) top = load(scores + n) > top ? load(scores + n) : top;
    const float most = highest(top);
    for (int64_t n = 0; n < n_size; n += kLanes) {
      Vec weight = exponential(load(scores + n) - most);
      store(scores + n, weight);
      total += weight;
    }
    shares[r] = 1 / sum(total);
  }
}

void multiply_rows(float* x, const float* by, int64_t rows, int64_t n_size) {
  for (int64_t i = 0; i < rows * n_size; i += kLanes) store(x + i, load(x + i) * by[i / n_size]);
}

constexpr int64_t kFew = 8;       // queries for which transposing the keys does not pay
constexpr int64_t kQueries = 48;  // queries whose scores stay in the second-level cache

inline int64_t whole_blocks(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// One head: q [S,K] attends to k and v [T,K] -> out [S,K]; a few queries.
template <typename T>
void attend_few(const float* q, const T* k, const T* v, float* out, int64_t s_size, int64_t t_size, int64_t width) {
  static thread_local std::vector<float> scores;
  const int64_t padded = whole_blocks(t_size);
  float shares[kFew];
  scores.resize(kFew * padded);
  for (int64_t t = 0; t < t_size; t += kBlock)
    by_table(q, k + t * width, scores.data() + t, s_size, width, std::min(kBlock, t_size - t), padded, kBlock);
  to_weights(scores.data(), shares, s_size, t_size, padded);
  for (int64_t c = 0; c < width; c += kBlock)
    by_block(scores.data(), padded, v + c, width, out + c, width, s_size, t_size);
  multiply_rows(out, shares, s_size, width);
}

// The same for any number of queries; the keys are first transposed into blocks [K,kBlock].
template <typename T>
void attend(const float* q, const T* k, const T* v, float* out, int64_t s_size, int64_t t_size, int64_t width) {
  static thread_local std::vector<float> scores, keys;
  const int64_t padded = whole_blocks(t_size);
  float shares[kQueries];
  scores.resize(kQueries * padded);
  keys.resize(padded * width);
  for (int64_t t = 0; t < t_size; ++t)
    for (int64_t c = 0; c < width; c += kLanes) {
      Vec key = load(k + t * width + c);
      float* to = keys.data() + (t / kBlock * width + c) * kBlock + t % kBlock;
      for (int i = 0; i < kLanes; ++i) to[i * kBlock] = key[i];
    }
  for (; s_size > 0; s_size -= kQueries, q += kQueries * width, out += kQueries * width) {
    const int64_t n = std::min(kQueries, s_size);
    for (int64_t t = 0; t < t_size; t += kBlock)
      by_block(q, width, keys.data() + t * width, kBlock, scores.data() + t, padded, n, width);
    to_weights(scores.data(), shares, n, t_size, padded);
    for (int64_t c = 0; c < width; c += kBlock)
      by_block(scores.data(), padded, v + c, width, out + c, width, n, t_size);
    multiply_rows(out, shares, n, width);
  }
}

#ifdef __AVX512BF16__
// The same, with queries and weights rounded to bfloat16, and pairs along K and T.
void attend(const float* q, const BFloat16* k, const BFloat16* v, float* out, int64_t s_size, int64_t t_size,
            int64_t width) {
  static thread_local std::vector<float> scores;
  static thread_local std::vector<Pair> keys, values, rows;
  const int64_t padded = whole_blocks(t_size), half = width / 2;
  float shares[kQueries];
  scores.resize(kQueries * padded);
  keys.resize(padded * half);
  values.resize(padded * half);
  rows.resize(kQueries * std::max(padded, width) / 2);
  for (int64_t t = 0; t < t_size; ++t)
    for (int64_t c = 0; c < half; ++c)
      keys[(t / kBlock * half + c) * kBlock + t % kBlock] = reinterpret_cast<const Pair*>(k)[t * half + c];
  for (int64_t t = 0; t < t_size; t += 2)
    for (int64_t c = 0; c < width; ++c)
      values[t * half + c] = v[t * width + c] | (t + 1 < t_size ? Pair(v[(t + 1) * width + c]) << 16 : 0);
  for (; s_size > 0; s_size -= kQueries, q += kQueries * width, out += kQueries * width) {
    const int64_t n = std::min(kQueries, s_size);
    to_pairs(q, rows.data(), n * width);
    for (int64_t t = 0; t < t_size; t += kBlock)
      by_block(rows.data(), half, keys.data() + t * half, kBlock, scores.data() + t, padded, n, half);
    to_weights(scores.data(), shares, n, t_size, padded);
    to_pairs(scores.data(), rows.data(), n * padded);
    for (int64_t c = 0; c < width; c += kBlock)
      by_block(rows.data(), padded / 2, values.data() + c, width, out + c, width, n, (t_size + 1) / 2);
    multiply_rows(out, shares, n, width);
  }
}
#endif

template <typename T>
void table_product(ffi::ThreadPool& pool, const float* x, const T* table, float* y, int64_t rows, int64_t k,
                   int64_t n) {
  constexpr int64_t kPiece = 32;  // entries that stay in the second-level cache for all rows, with the prefetched ones
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
  constexpr int64_t kPart = 384;  // queries of a head for which its keys are transposed once
  const int64_t parts = (s + kPart - 1) / kPart, longest = *std::max_element(lengths, lengths + heads);
  for_each(pool, heads * parts, heads * s * longest * width, [=](int64_t i) {
    int64_t head = i / parts, from = i % parts * kPart, at = (head * s + from) * width;
    const T *keys = k + head * t * width, *values = v + head * t * width;
    int64_t n = std::min(kPart, s - from), length = std::clamp<int64_t>(lengths[head], 1, t);
    if (n <= kFew)
      attend_few(q + at, keys, values, out + at, n, length, width);
    else
      attend(q + at, keys, values, out + at, n, length, width);
  });
}

// q [B,H,G,K] attends to k and v [B,H,S*G,K] -> out [B,H,G,K]: row b * G + g reads the place source [B*G,S] of each
// position, none where that is negative. `end` positions were written, in a ring: what a row reads is in the order in
// which it was written, whatever its place in the ring, and is put together where it is not adjacent.
template <typename T>
void cached_attention(ffi::ThreadPool& pool, const float* q, const T* k, const T* v, const int32_t* source, int64_t end,
                      float* out, int64_t windows, int64_t heads, int64_t s_size, int64_t group, int64_t width) {
  const int64_t written = std::clamp<int64_t>(end, 1, s_size), oldest = end > s_size ? end % s_size : 0;
  for_each(pool, windows * heads * group, windows * heads * group * written * width, [=](int64_t i) {
    static thread_local std::vector<int64_t> places;
    static thread_local std::vector<T> keys, values;
    const int64_t place = i % group, head = i / group, window = head / heads;
    const int32_t* from = source + (window * group + place) * s_size;
    places.clear();
    for (int64_t j = 0; j < written; ++j) {
      const int64_t t = oldest + j < s_size ? oldest + j : oldest + j - s_size;
      if (from[t] >= 0 && from[t] < group) places.push_back((head * s_size + t) * group + from[t]);
    }
    const int64_t n = places.size();
    if (n > 0 && places.back() - places.front() == n - 1) {  // adjacent: places increase, except where the ring begins again
      const int64_t at = places.front() * width;
      attend_few(q + i * width, k + at, v + at, out + i * width, 1, n, width);
      return;
    }
    keys.resize(n * width);
    values.resize(n * width);
    for (int64_t j = 0; j < n; ++j) {
      std::copy_n(k + places[j] * width, width, keys.data() + j * width);
      std::copy_n(v + places[j] * width, width, values.data() + j * width);
    }
    attend_few(q + i * width, keys.data(), values.data(), out + i * width, 1, n, width);
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

ffi::Error CachedAttention(ffi::ThreadPool pool, Floats q, ffi::AnyBuffer k, ffi::AnyBuffer v, Numbers source,
                           Numbers end, ffi::Result<Floats> out) {
  auto size = q.dimensions();  // [B,H,G,K]
  return by_type(k.element_type(), [&](auto kind) {
    using T = decltype(kind);
    cached_attention(pool, q.typed_data(), (const T*)k.untyped_data(), (const T*)v.untyped_data(), source.typed_data(),
                     end.typed_data()[0], out->typed_data(), size[0], size[1], source.dimensions()[1], size[2], size[3]);
  });
}

// Dynamic time warping: where the cheapest path over cost [N,M], of which [n,m] counts, enters each row.
ffi::Error FirstPositions(Floats cost, Numbers counts, ffi::Result<Numbers> first) {
  enum Step : uint8_t { kDiagonal, kDown, kRight };
  const int64_t rows = cost.dimensions()[0], columns = cost.dimensions()[1];
  const int64_t n = std::clamp<int64_t>(counts.typed_data()[0], 0, rows);
  const int64_t m = std::clamp<int64_t>(counts.typed_data()[1], 0, columns);
  std::vector<double> totals(m + 1, kFar);  // of the row above, from the left on already of this one
  std::vector<uint8_t> steps((n + 1) * (m + 1));
  totals[0] = 0;
  for (int64_t i = 1; i <= n; ++i) {
    double up_left = std::exchange(totals[0], kFar);
    for (int64_t j = 1; j <= m; ++j) {
      const double up = totals[j], left = totals[j - 1];
      const bool diagonal = up_left < up && up_left < left, down = up < up_left && up < left;
      totals[j] = (diagonal ? up_left : down ? up : left) + cost.typed_data()[(i - 1) * columns + j - 1];
      steps[i * (m + 1) + j] = diagonal ? kDiagonal : down ? kDown : kRight;
      up_left = up;
    }
  }
  std::fill_n(first->typed_data(), rows, 0);
  for (int64_t i = n, j = m; i > 0 || j > 0;) {
    if (i > 0) first->typed_data()[i - 1] = j - 1;
    const int step = j == 0 ? kDown : i == 0 ? kRight : steps[i * (m + 1) + j];
    i -= step != kRight;
    j -= step != kDown;
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FirstPositionsHandler, FirstPositions,
                              ffi::Ffi::Bind().Arg<Floats>().Arg<Numbers>().Ret<Numbers>());
#define HANDLER(function, arguments)                      \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(function##Handler, function, \
                                ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() arguments.Ret<Floats>())
HANDLER(TableProduct, .Arg<Floats>().Arg<ffi::AnyBuffer>());
HANDLER(LayerProduct, .Arg<Floats>().Arg<ffi::AnyBuffer>());
HANDLER(TableRows, .Arg<ffi::AnyBuffer>().Arg<Numbers>());
HANDLER(Attention, .Arg<Floats>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<Numbers>());
HANDLER(CachedAttention,
        .Arg<Floats>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<Numbers>().Arg<Numbers>());

// Identifies the library to build.py.
extern "C" const char* Key() { return KEY; }

extern "C" bool MultipliesBFloat16() {
#ifdef __AVX512BF16__
  return true;
#endif
  return false;
}
