// Vectors of one register: 8-, 16- and 32-bit numbers, converted to float32 as they are loaded.
#pragma once

#ifdef __AVX__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>

// Numbers in a register, and the accumulator tiles that fit the registers beside the operands (`dots`, `columns`).
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kDotRows = 6, kColumns = 4;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8, kDotRows = 2, kColumns = 2;
#elif defined(__aarch64__)
constexpr int64_t kLanes = 4, kDotRows = 6, kColumns = 4;
#else
constexpr int64_t kLanes = 4, kDotRows = 2, kColumns = 2;
#endif

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

inline void add_product(Vec& total, float x, Vec entry) { total += x * entry; }

#ifdef __AVX512BF16__
using Pair = uint32_t;  // two bfloat16 numbers, multiplied and added by one instruction
inline Ints load(const Pair* p) { return *reinterpret_cast<const Ints*>(p); }
inline void add_product(Vec& total, Pair x, Ints entry) {
  total = (Vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(x), (__m512bh)entry);
}
inline void to_pairs(const float* x, Pair* pairs, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    _mm256_storeu_si256((__m256i*)(pairs + i / 2), (__m256i)_mm512_cvtneps_pbh((__m512)load(x + i)));
}
#endif

inline float sum(Vec x) {
  Four total = ((Four*)&x)[0];
  for (int i = 1; i < kLanes / 4; ++i) total += ((Four*)&x)[i];
  return (total[0] + total[2]) + (total[1] + total[3]);
}

// Sums of four vectors at once: faster than one by one.
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
