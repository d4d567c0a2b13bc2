"""C++ of what the kernels of a step of decoding are written with (``native_umv2`` calls them): threads, vectors, norms.

Vectors are as wide as the CPU's registers. bfloat16 numbers are widened to float32, and rounded where they are stored.

It is a text in a Python file because transformers copies only these with a model.
"""

VECTORS = r"""
// Threads, vectors, and sums, exponentials and norms of rows.

#pragma once

#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace umv2 {

// -- threads

struct Team {
    int64_t part = 0, parts = 1;

    void wait() const {  // for all threads of the team
#ifdef _OPENMP
#pragma omp barrier
#endif
    }
    int64_t begin(int64_t items) const { return items * part / parts; }
    int64_t end(int64_t items) const { return items * (part + 1) / parts; }
};

template <typename Work>
void with_team(int64_t threads, const Work& work) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
        work(Team{static_cast<int64_t>(omp_get_thread_num()), static_cast<int64_t>(omp_get_num_threads())});
        return;
    }
#endif
    work(Team{});
}

// -- vectors

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

inline Vector load(const float* from) {
    Vector result;
    std::memcpy(&result, from, sizeof result);
    return result;
}
inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }
inline Vector all(float value) { return Vector{} + value; }

struct Half {  // a bfloat16 number
    uint16_t bits;
};
inline const uint16_t* bits(const Half* from) { return &from->bits; }
inline float value_of(float from) { return from; }
inline float value_of(Half from) {
    const uint32_t bits = static_cast<uint32_t>(from.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}
inline void put_value(float value, float* to) { *to = value; }
inline void put_value(float value, Half* to) {  // halves to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    to->bits = static_cast<uint16_t>(value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline Vector load(const Half* from) {
#if defined(__AVX512F__)
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#elif defined(__AVX2__)
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#else
    float values[LANES];
    for (int i = 0; i < LANES; ++i) values[i] = value_of(from[i]);
    return load(values);
#endif
}
inline void narrow(const float* from, int64_t count, Half* to) {
    for (int64_t i = 0; i < count; ++i) put_value(from[i], to + i);
}
template <typename Real>
void widen(const Real* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    for (; i < count; ++i) to[i] = value_of(from[i]);
}

// Sums of the lanes l with l % rank = r, for every r < rank; rank is 1, 2 or 4.
inline void fold(Vector value, int64_t rank, float* sums) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)value),
                                      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)value), 1)));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX__)
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)value), _mm256_extractf128_ps((__m256)value, 1));
#else
    const __m128 four = (__m128)value;
#endif
    if (rank == 4) {
        _mm_storeu_ps(sums, four);
        return;
    }
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    sums[0] = _mm_cvtss_f32(two);
    const float odd = _mm_cvtss_f32(_mm_shuffle_ps(two, two, 1));
    if (rank == 2) sums[1] = odd;
    else sums[0] += odd;
#else
    float lanes[LANES];
    store(lanes, value);
    for (int64_t r = 0; r < rank; ++r) sums[r] = 0;
    for (int l = 0; l < LANES; ++l) sums[l % rank] += lanes[l];
#endif
}

inline float sum_of(Vector value) {
    float result;
    fold(value, 1, &result);
    return result;
}

template <typename Real>
float dot(const float* one, const Real* other, int64_t count) {
    Vector sum{}, sum2{};
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        sum += load(one + i) * load(other + i);
        sum2 += load(one + i + LANES) * load(other + i + LANES);
    }
    for (; i + LANES <= count; i += LANES) sum += load(one + i) * load(other + i);
    float result = sum_of(sum + sum2);
    for (; i < count; ++i) result += one[i] * value_of(other[i]);
    return result;
}

// to += weight * from
template <typename Real>
void add_scaled(float* to, float weight, const Real* from, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(to + i) + weight * load(from + i));
    for (; i < count; ++i) to[i] += weight * value_of(from[i]);
}

// e^x to two units in the last place; 0 below -87, and for the smallest float.
inline Vector exponential(Vector x) {
    const Vector low = all(-87.0f), high = all(88.0f);
    const Integers tiny = x < low;
    x = x < low ? low : (x > high ? high : x);
    const Vector shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vector whole = (x * 1.44269504f + shift) - shift;
    const Vector rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vector sum = all(1.98756915e-4f);
    sum = sum * rest + 1.39819995e-3f;
    sum = sum * rest + 8.33345190e-3f;
    sum = sum * rest + 4.16657961e-2f;
    sum = sum * rest + 1.66666654e-1f;
    sum = sum * rest + 5.00000012e-1f;
    sum = (sum * rest) * rest + rest + 1.0f;
    const Integers power = (__builtin_convertvector(whole, Integers) + 127) << 23;
    Vector scale;
    std::memcpy(&scale, &power, sizeof scale);
    return tiny ? Vector{} : sum * scale;
}

// to = silu(to) * other
inline void silu_times(float* to, const float* other, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Vector x = load(to + i);
        store(to + i, x / (1.0f + exponential(-x)) * load(other + i));
    }
    float from[LANES] = {}, result[LANES];
    if (i == count) return;
    std::memcpy(from, to + i, static_cast<size_t>(count - i) * sizeof(float));
    const Vector x = load(from);
    store(result, x / (1.0f + exponential(-x)));
    for (int64_t j = i; j < count; ++j) to[j] = result[j - i] * other[j];
}

// to = x / sqrt(mean(x^2) + epsilon) * (gain + shift)
template <typename Real>
void rms_norm(const float* x, const Real* gain, float shift, float epsilon, int64_t count, float* to) {
    const float scale = 1.0f / __builtin_sqrtf(dot(x, x, count) / static_cast<float>(count) + epsilon);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(x + i) * scale * (load(gain + i) + shift));
    for (; i < count; ++i) to[i] = x[i] * scale * (value_of(gain[i]) + shift);
}

}  // namespace umv2
"""
