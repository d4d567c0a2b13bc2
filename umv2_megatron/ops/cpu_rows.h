// Products and sums of rows of numbers, for the kernels for CPUs, in vectors of float or double that stay in registers.
//
// What a sum's order is depends neither on how many rows are worked on at once nor on where they lie.

#pragma once

#include <cstdint>
#include <cstring>

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
    const Words words = __builtin_convertvector(halves, Words) << 16;
    std::memcpy(&to, &words, sizeof to);
}

inline void store_narrow(float* to, const Wide<float>::Vector& from) { std::memcpy(to, &from, sizeof from); }
inline void store_narrow(double* to, const Wide<double>::Vector& from) { std::memcpy(to, &from, sizeof from); }
inline void store_narrow(bfloat16* to, const Wide<float>::Vector& from) {
    Words bits;
    std::memcpy(&bits, &from, sizeof bits);
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words odd = reinterpret_cast<Words>(from != from);
    rounded = (odd & 0x7fc0) | (~odd & rounded);
    const Halves halves = __builtin_convertvector(rounded, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

// The sum of the lanes, as a tree.
template <typename Acc>
inline Acc sum_of_lanes(const typename Wide<Acc>::Vector& vector) {
    Acc lanes[Wide<Acc>::LANES];
    std::memcpy(lanes, &vector, sizeof lanes);
    for (int64_t half = Wide<Acc>::LANES / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// out[n] = < row(n), x > of ROWS rows, `count` numbers each.
template <int64_t ROWS, typename Acc, typename Row>
inline void dots(const Row& row, const Acc* x, int64_t count, Acc* out) {
    constexpr int64_t LANES = Wide<Acc>::LANES;
    typename Wide<Acc>::Vector sum[ROWS] = {}, factor, numbers;
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) {
        load_wide(factor, x + j);
        for (int64_t n = 0; n < ROWS; ++n) {
            load_wide(numbers, row(n) + j);
            sum[n] += numbers * factor;
        }
    }
    for (int64_t n = 0; n < ROWS; ++n) {
        Acc total = sum_of_lanes<Acc>(sum[n]);
        for (int64_t i = j; i < count; ++i) total += static_cast<Acc>(widen(row(n)[i])) * x[i];
        out[n] = total;
    }
}

// to[0..width) += sum over i < count of weight(i) * row(i)[0..width), in the order of i.
template <int64_t V, typename Acc, typename Weight, typename Row>
inline void add_columns(Acc* to, int64_t count, const Weight& weight, const Row& row, int64_t column) {
    constexpr int64_t LANES = Wide<Acc>::LANES;
    typename Wide<Acc>::Vector sum[V], numbers;
    for (int64_t v = 0; v < V; ++v) load_wide(sum[v], to + column + v * LANES);
    for (int64_t i = 0; i < count; ++i) {
        const auto* from = row(i) + column;
        const Acc factor = weight(i);
        for (int64_t v = 0; v < V; ++v) {
            load_wide(numbers, from + v * LANES);
            sum[v] += factor * numbers;
        }
    }
    for (int64_t v = 0; v < V; ++v) store_narrow(to + column + v * LANES, sum[v]);
}

template <typename Acc, typename Weight, typename Row>
inline void add_rows(Acc* to, int64_t width, int64_t count, const Weight& weight, const Row& row) {
    constexpr int64_t LANES = Wide<Acc>::LANES;
    int64_t column = 0;
    for (; column + 6 * LANES <= width; column += 6 * LANES) add_columns<6>(to, count, weight, row, column);
    for (; column + LANES <= width; column += LANES) add_columns<1>(to, count, weight, row, column);
    for (int64_t i = 0; i < count && column < width; ++i)
        for (int64_t j = column; j < width; ++j) to[j] += weight(i) * static_cast<Acc>(widen(row(i)[j]));
}

// to += weight * from, `count` numbers; `to` in any type.
template <typename Sum, typename Acc>
inline void add_to_row(Sum* to, Acc weight, const Acc* from, int64_t count) {
    constexpr int64_t LANES = Wide<Acc>::LANES;
    typename Wide<Acc>::Vector sum, numbers;
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) {
        load_wide(sum, to + j);
        load_wide(numbers, from + j);
        sum += weight * numbers;
        store_narrow(to + j, sum);
    }
    for (; j < count; ++j) narrow(static_cast<Acc>(widen(to[j])) + weight * from[j], to[j]);
}

// Both in one pass over `grad`: < row, grad >, and to += weight * grad.
template <typename Table, typename Sum, typename Acc>
inline Acc dot_and_add(const Table* row, Sum* to, Acc weight, const Acc* grad, int64_t count) {
    constexpr int64_t LANES = Wide<Acc>::LANES;
    typename Wide<Acc>::Vector total = {}, sum, numbers, factor;
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) {
        load_wide(factor, grad + j);
        load_wide(numbers, row + j);
        load_wide(sum, to + j);
        total += numbers * factor;
        sum += weight * factor;
        store_narrow(to + j, sum);
    }
    Acc found = sum_of_lanes<Acc>(total);
    for (; j < count; ++j) {
        found += static_cast<Acc>(widen(row[j])) * grad[j];
        narrow(static_cast<Acc>(widen(to[j])) + weight * grad[j], to[j]);
    }
    return found;
}

}  // namespace umv2
