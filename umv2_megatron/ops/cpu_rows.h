// Products and sums of rows of numbers, for the kernels for CPUs, in vectors of float or double that stay in registers.
//
// What a sum's order is depends neither on how many rows are worked on at once nor on where they lie.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "cpu_product.h"

namespace umv2 {

struct bfloat16 {
    uint16_t bits;
};

template <typename Acc>
struct Wide {
    typedef Acc Vector __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int64_t LANES = VECTOR_BYTES / sizeof(Acc);
};

typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, bfloat16& out) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

inline void load_wide(Wide<float>::Vector& to, const float* from) { std::memcpy(&to, from, sizeof to); }
inline void load_wide(Wide<double>::Vector& to, const double* from) { std::memcpy(&to, from, sizeof to); }
inline void load_wide(Wide<float>::Vector& to, const bfloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
#if defined(__AVX512F__)
    const Words words = reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(halves))) << 16;
#else
    const Words words = __builtin_convertvector(halves, Words) << 16;
#endif
    std::memcpy(&to, &words, sizeof to);
}

inline void store_narrow(float* to, const Wide<float>::Vector& from) { std::memcpy(to, &from, sizeof from); }
inline void store_narrow(double* to, const Wide<double>::Vector& from) { std::memcpy(to, &from, sizeof from); }

// -- strips: what a row is read in
//
// 2 * LANES neighbouring numbers of a row as two vectors, in the order that costs least: bfloat16 numbers at even places,
// then those at odd ones, because a shift or a mask widens each half of 32 bits where it lies. What is multiplied with
// strips, or added up of them, lies in the same order, made and unmade by convert_row.

template <typename Acc>
struct Strip {
    typename Wide<Acc>::Vector first, second;
    static constexpr int64_t NUMBERS = 2 * Wide<Acc>::LANES;
};

template <typename Acc>
inline void load_strip(Strip<Acc>& to, const Acc* from) {
    load_wide(to.first, from);
    load_wide(to.second, from + Wide<Acc>::LANES);
}
inline void load_strip(Strip<float>& to, const bfloat16* from) {
    Words pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    const Words low = pairs << 16, high = pairs & 0xffff0000u;
    std::memcpy(&to.first, &low, sizeof low);
    std::memcpy(&to.second, &high, sizeof high);
}

// The bits of a bfloat16 in the upper half of every word: rounded to nearest, ties to even; NaN stays NaN.
inline void round_words(Words& to, const Wide<float>::Vector& from) {
    Words bits;
    std::memcpy(&bits, &from, sizeof bits);
    const Words odd = reinterpret_cast<Words>(from != from);
    to = (odd & 0x7fc00000u) | (~odd & (bits + 0x7fff + ((bits >> 16) & 1)));
}

template <typename Acc>
inline void store_strip(Acc* to, const Strip<Acc>& from) {
    store_narrow(to, from.first);
    store_narrow(to + Wide<Acc>::LANES, from.second);
}
inline void store_strip(bfloat16* to, const Strip<float>& from) {
    Words low, high;
    round_words(low, from.first);
    round_words(high, from.second);
    const Words pairs = (low >> 16) | (high & 0xffff0000u);
    std::memcpy(to, &pairs, sizeof pairs);
}

// to [count] = from, strips in their order: from a table's type to that of sums, or back.
template <typename From, typename To>
inline void convert_row(const From* from, int64_t count, To* to) {
    using Acc = std::conditional_t<std::is_same<From, bfloat16>::value, To, From>;
    Strip<Acc> strip;
    int64_t j = 0;
    for (; j + Strip<Acc>::NUMBERS <= count; j += Strip<Acc>::NUMBERS) {
        load_strip(strip, from + j);
        store_strip(to + j, strip);
    }
    for (; j < count; ++j) narrow(static_cast<Acc>(widen(from[j])), to[j]);
}

// -- sums of lanes, as a tree: lane i and lane i + half of all, until one is left

template <int64_t ROWS, typename Acc>
inline void sums_of_lanes(const typename Wide<Acc>::Vector (&vectors)[ROWS], Acc* out) {
    for (int64_t n = 0; n < ROWS; ++n) {
        Acc lanes[Wide<Acc>::LANES];
        std::memcpy(lanes, &vectors[n], sizeof lanes);
        for (int64_t half = Wide<Acc>::LANES / 2; half > 0; half /= 2)
            for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
        out[n] = lanes[0];
    }
}

#if defined(__AVX__)
inline __m128 four_sums(const Wide<float>::Vector& vector) {
#if defined(__AVX512F__)
    const __m512 all = reinterpret_cast<__m512>(vector);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all),
                                      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
#else
    const __m256 half = reinterpret_cast<__m256>(vector);
#endif
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

template <>
inline void sums_of_lanes<1, float>(const Wide<float>::Vector (&vectors)[1], float* out) {
    const __m128 four = four_sums(vectors[0]), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    *out = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The same for four vectors side by side.
template <>
inline void sums_of_lanes<4, float>(const Wide<float>::Vector (&vectors)[4], float* out) {
    const __m128 a = four_sums(vectors[0]), b = four_sums(vectors[1]), c = four_sums(vectors[2]), d = four_sums(vectors[3]);
    const __m128 ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
    const __m128 cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
    _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
}
#endif

// -- products and sums

// out[n] = < row(n), x > of ROWS rows, `count` numbers each; x in the order of strips.
template <int64_t ROWS, typename Acc, typename Row>
inline void dots(const Row& row, const Acc* x, int64_t count, Acc* out) {
    constexpr int64_t LANES = Wide<Acc>::LANES;
    typename Wide<Acc>::Vector sum[ROWS], other[ROWS], numbers, factor;
    Strip<Acc> strip, factors;
    decltype(row(0)) from[ROWS];
    for (int64_t n = 0; n < ROWS; ++n) {
        from[n] = row(n);
        sum[n] = other[n] = typename Wide<Acc>::Vector{};
    }
    int64_t j = 0;
    for (; j + 2 * LANES <= count; j += 2 * LANES) {
        load_strip(factors, x + j);
        for (int64_t n = 0; n < ROWS; ++n) {
            load_strip(strip, from[n] + j);
            sum[n] += strip.first * factors.first;
            other[n] += strip.second * factors.second;
        }
    }
    if (j + LANES <= count) {
        load_wide(factor, x + j);
        for (int64_t n = 0; n < ROWS; ++n) {
            load_wide(numbers, from[n] + j);
            sum[n] += numbers * factor;
        }
        j += LANES;
    }
    for (int64_t n = 0; n < ROWS; ++n) sum[n] += other[n];
    sums_of_lanes<ROWS, Acc>(sum, out);
    for (; j < count; ++j)
        for (int64_t n = 0; n < ROWS; ++n) out[n] += static_cast<Acc>(widen(from[n][j])) * x[j];
}

// to[0..width) += sum over i < count of weight(i) * row(i)[0..width), in the order of i; `to` in the order of strips.
template <int64_t V, typename Acc, typename Weight, typename Row>
inline void add_columns(Acc* to, int64_t count, const Weight& weight, const Row& row, int64_t column) {
    constexpr int64_t NUMBERS = Strip<Acc>::NUMBERS;
    Strip<Acc> sum[V], strip;
    for (int64_t v = 0; v < V; ++v) load_strip(sum[v], to + column + v * NUMBERS);
    for (int64_t i = 0; i < count; ++i) {
        const auto* from = row(i) + column;
        const Acc factor = weight(i);
        for (int64_t v = 0; v < V; ++v) {
            load_strip(strip, from + v * NUMBERS);
            sum[v].first += factor * strip.first;
            sum[v].second += factor * strip.second;
        }
    }
    for (int64_t v = 0; v < V; ++v) store_strip(to + column + v * NUMBERS, sum[v]);
}

template <typename Acc, typename Weight, typename Row>
inline void add_rows(Acc* to, int64_t width, int64_t count, const Weight& weight, const Row& row) {
    constexpr int64_t NUMBERS = Strip<Acc>::NUMBERS, LANES = Wide<Acc>::LANES;
    int64_t column = 0;
    for (; column + 3 * NUMBERS <= width; column += 3 * NUMBERS) add_columns<3>(to, count, weight, row, column);
    for (; column + NUMBERS <= width; column += NUMBERS) add_columns<1>(to, count, weight, row, column);
    if (column + LANES <= width) {
        typename Wide<Acc>::Vector sum, numbers;
        load_wide(sum, to + column);
        for (int64_t i = 0; i < count; ++i) {
            load_wide(numbers, row(i) + column);
            sum += weight(i) * numbers;
        }
        store_narrow(to + column, sum);
        column += LANES;
    }
    for (int64_t i = 0; i < count && column < width; ++i)
        for (int64_t j = column; j < width; ++j) to[j] += weight(i) * static_cast<Acc>(widen(row(i)[j]));
}

// to += weight * from, `count` numbers; `from` in the order of strips of `to`.
template <typename Sum, typename Acc>
inline void add_to_row(Sum* to, Acc weight, const Acc* from, int64_t count) {
    Strip<Acc> sum, numbers;
    int64_t j = 0;
#pragma GCC unroll 3
    for (; j + Strip<Acc>::NUMBERS <= count; j += Strip<Acc>::NUMBERS) {
        load_strip(sum, to + j);
        load_strip(numbers, from + j);
        sum.first += weight * numbers.first;
        sum.second += weight * numbers.second;
        store_strip(to + j, sum);
    }
    for (; j < count; ++j) narrow(static_cast<Acc>(widen(to[j])) + weight * from[j], to[j]);
}

}  // namespace umv2
