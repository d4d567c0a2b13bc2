"""C++ of the products of a step of decoding (``native_umv2`` calls it): few rows times a weight as it lies in memory.

A product y [M, N] = x [M, K] W' reads W [N, K] once, several rows of it side by side, and asks for the rows of the
next tile while it computes with these. So up to a few rows of x it takes the time that reading W takes. Nothing is
packed but x. Kinds of tiles, whichever has the registers for M:

    dot        lanes along K, M x NB sums that are added up over the lanes in the end: for the smallest M
    broadcast  lanes along M, x transposed, each number of W with all lanes of x: from there on
    paired     the same with two columns of x in a vector: for M that fill half of its lanes (AVX-512)

It is a text in a Python file because transformers copies only these with a model.
"""

PRODUCTS = r"""
// Threads, vectors, and products of few rows with a weight [N, K].

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
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

// -- products

constexpr int64_t LARGEST_BATCH = 64;
constexpr int64_t LINE = 16;  // floats of a cache line
template <typename Real>
constexpr int64_t LINE_OF = 64 / sizeof(Real);
#if defined(__AVX512F__)
constexpr int DOT_BATCH = 8, WIDE = 8;  // rows of x up to which dots are computed; rows of W beside two vectors of x
#elif defined(__AVX__)
constexpr int DOT_BATCH = 4, WIDE = 6;
#else
constexpr int DOT_BATCH = 4, WIDE = 6;
#endif
constexpr int NARROW = 12;  // rows of W beside one vector of x

// sums [MB][NB] of MB rows of x and NB rows of W; `next` is what is read after them.
template <int MB, int NB>
void dot_tile(const float* x, int64_t columns, const float* w, const float* next, float* sums) {
    Vector total[NB][MB];
    for (auto& row : total)
        for (auto& sum : row) sum = Vector{};  // one by one: they live in registers
    int64_t k = 0;
    for (; k + LANES <= columns; k += LANES) {
        Vector rows[NB];
        for (int n = 0; n < NB; ++n) {
            rows[n] = load(w + n * columns + k);
            __builtin_prefetch(next + n * columns + k, 0, 3);
        }
        for (int m = 0; m < MB; ++m) {
            const Vector one = load(x + m * columns + k);
            for (int n = 0; n < NB; ++n) total[n][m] += rows[n] * one;
        }
    }
    for (int n = 0; n < NB; ++n)
        for (int m = 0; m < MB; ++m) {
            float sum = sum_of(total[n][m]);
            for (int64_t rest = k; rest < columns; ++rest) sum += w[n * columns + rest] * x[m * columns + rest];
            sums[m * NB + n] = sum;
        }
}

// sums [MV * LANES][NB]; x is transposed, [K][MV * LANES].
template <int MV, int NB>
void broadcast_tile(const float* x, int64_t columns, const float* w, const float* next, float* sums) {
    Vector total[NB][MV];
    for (auto& row : total)
        for (auto& sum : row) sum = Vector{};
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
        Vector ones[MV];
        for (int m = 0; m < MV; ++m) ones[m] = load(x + (k * MV + m) * LANES);
        for (int n = 0; n < NB; ++n) {
            const float number = w[n * columns + k];
            for (int m = 0; m < MV; ++m) total[n][m] += number * ones[m];
        }
    };
    int64_t k = 0;
    for (; k + LINE <= columns; k += LINE) {
        // To the second level of cache: x and the rows at hand need the first.
        for (int n = 0; n < NB; ++n) __builtin_prefetch(next + n * columns + k, 0, 2);
#pragma GCC unroll 4
        for (int64_t j = 0; j < LINE; ++j) step(k + j);
    }
    for (; k < columns; ++k) step(k);
    float lanes[NB][MV * LANES];
    for (int n = 0; n < NB; ++n)
        for (int m = 0; m < MV; ++m) store(lanes[n] + m * LANES, total[n][m]);
    for (int m = 0; m < MV * LANES; ++m)
        for (int n = 0; n < NB; ++n) sums[m * NB + n] = lanes[n][m];
}

#if defined(__AVX512F__)
constexpr int64_t PAIRED_BATCH = LANES / 2;

// sums [PAIRED_BATCH][NB]: as broadcast_tile with two columns in one vector, which x [K / 2][PAIRED_BATCH][2] must be
// packed for; K is even.
template <int NB>
void paired_tile(const float* x, int64_t columns, const float* w, const float* next, float* sums) {
    Vector total[NB];
    for (auto& sum : total) sum = Vector{};
    int64_t k = 0;
    const auto step = [&](int64_t at) __attribute__((always_inline)) {
        const Vector ones = load(x + at * PAIRED_BATCH);
        for (int n = 0; n < NB; ++n) {
            double pair;
            std::memcpy(&pair, w + n * columns + at, sizeof pair);
            total[n] += (Vector)_mm512_castpd_ps(_mm512_set1_pd(pair)) * ones;
        }
    };
    for (; k + LINE <= columns; k += LINE) {
        for (int n = 0; n < NB; ++n) __builtin_prefetch(next + n * columns + k, 0, 2);
#pragma GCC unroll 4
        for (int64_t j = 0; j < LINE; j += 2) step(k + j);
    }
    for (; k < columns; k += 2) step(k);
    for (int n = 0; n < NB; ++n) {
        float lanes[LANES];
        store(lanes, total[n]);
        for (int m = 0; m < PAIRED_BATCH; ++m) sums[m * NB + n] = lanes[2 * m] + lanes[2 * m + 1];
    }
}
#endif

typedef void (*Tile)(const float*, int64_t, const float*, const float*, float*);

// Rows of x that are computed together.
struct Chunk {
    int64_t first, count, width;  // width: of a column of packed x
    Tile tile, single;            // of the plan's rows of W, and of one
};

struct Plan {
    Chunk chunks[LARGEST_BATCH / LANES + 1];
    int count = 0;
    int64_t rows = 0;       // of W in a tile
    bool transposed = false, paired = false;

    Plan(int64_t batch, int64_t columns) {
#if defined(__AVX512F__)
        if (batch > DOT_BATCH / 2 && batch <= PAIRED_BATCH && columns % 2 == 0) {
            transposed = paired = true;
            rows = NARROW;
            chunks[count++] = {0, batch, PAIRED_BATCH, paired_tile<NARROW>, paired_tile<1>};
            return;
        }
#endif
        if (batch <= DOT_BATCH) {
            dots(batch);
            return;
        }
        transposed = true;
        rows = batch <= LANES ? NARROW : WIDE;
        for (int64_t first = 0; first < batch; first += 2 * LANES) {
            const int64_t left = std::min<int64_t>(batch - first, 2 * LANES);
            if (batch <= LANES)
                chunks[count++] = {first, left, LANES, broadcast_tile<1, NARROW>, broadcast_tile<1, 1>};
            else if (left <= LANES)
                chunks[count++] = {first, left, LANES, broadcast_tile<1, WIDE>, broadcast_tile<1, 1>};
            else
                chunks[count++] = {first, left, 2 * LANES, broadcast_tile<2, WIDE>, broadcast_tile<2, 1>};
        }
    }

  private:
    template <int MB, int NB>
    void dots() {
        rows = NB;
        chunks[count++] = {0, MB, MB, dot_tile<MB, NB>, dot_tile<MB, 1>};
    }
    void dots(int64_t batch) {
        switch (batch) {
            case 1: return dots<1, 4>();
            case 2: return dots<2, 4>();
#if defined(__AVX512F__)
            case 3: return dots<3, 4>();
            case 4: return dots<4, 4>();
            case 5: return dots<5, 2>();
            case 6: return dots<6, 2>();
            case 7: return dots<7, 2>();
            case 8: return dots<8, 2>();
#else
            case 3: return dots<3, 3>();
            case 4: return dots<4, 3>();
#endif
        }
    }
};

// x [M, K] to [K / 2][width][2]
inline void pack_pairs(const Team& team, int64_t batch, int64_t columns, const float* x, int64_t width, float* to) {
    for (int64_t pair = team.begin(columns / 2); pair < team.end(columns / 2); ++pair)
        for (int64_t m = 0; m < width; ++m)
            for (int64_t i = 0; i < 2; ++i)
                to[(pair * width + m) * 2 + i] = m < batch ? x[m * columns + 2 * pair + i] : 0;
}

template <typename Real>
struct Segment {  // out [M, rows] = x W' + bias, or that added to out
    const Real *weight, *bias;
    int64_t rows;
    float* out;
    int64_t stride;
    bool add;
};

// Sums of x's row m and `count` rows of W from `row` on.
template <typename Real>
void put(const Segment<Real>& segment, int64_t m, int64_t row, int64_t count, float* sums) {
    float* out = segment.out + m * segment.stride + row;
    if (segment.bias) add_scaled(sums, 1, segment.bias + row, count);
    if (segment.add) add_scaled(out, 1, sums, count);
    else std::copy_n(sums, count, out);
}

inline const float* as_floats(const float* w, int64_t, std::vector<float>&) { return w; }
inline const float* as_floats(const Half* w, int64_t count, std::vector<float>& spare) {
    if (spare.size() < static_cast<size_t>(count)) spare.resize(static_cast<size_t>(count));
    widen(w, count, spare.data());
    return spare.data();
}

// As `multiply` of tiles.h, which calls it.
template <typename Real>
void multiply_by_vectors(const Team& team, int64_t batch, int64_t columns, const float* x, float* packed,
                         const Segment<Real>* segments, int count) {
    const Plan plan(batch, columns);
    if (plan.transposed) {
        for (int c = 0; c < plan.count; ++c) {
            const Chunk& chunk = plan.chunks[c];
            float* to = packed + chunk.first * columns;
            if (plan.paired) {
                pack_pairs(team, batch, columns, x, chunk.width, to);
                continue;
            }
            for (int64_t k = team.begin(columns); k < team.end(columns); ++k) {
                for (int64_t m = 0; m < chunk.count; ++m)
                    to[k * chunk.width + m] = x[(chunk.first + m) * columns + k];
                for (int64_t m = chunk.count; m < chunk.width; ++m) to[k * chunk.width + m] = 0;
            }
        }
        team.wait();
        x = packed;
    }
    int64_t tiles = 0;
    for (int s = 0; s < count; ++s) tiles += (segments[s].rows + plan.rows - 1) / plan.rows;
    int64_t place = 0;
    const int64_t begin = team.begin(tiles), end = team.end(tiles);
    alignas(64) float sums[NARROW * 2 * LANES];
    thread_local std::vector<float> spare;
    for (int s = 0; s < count; ++s) {
        const Segment<Real>& segment = segments[s];
        const int64_t here = (segment.rows + plan.rows - 1) / plan.rows;
        for (int64_t tile = std::max(begin, place) - place; tile < here && place + tile < end; ++tile) {
            const int64_t first = tile * plan.rows;
            const bool whole = first + plan.rows <= segment.rows;
            for (int64_t row = first; row < std::min(segment.rows, first + plan.rows); row += whole ? plan.rows : 1) {
                const int64_t rows = whole ? plan.rows : 1;
                const Real* given = segment.weight + row * columns;
                const float* weight = as_floats(given, rows * columns, spare);
                // Numbers that have been widened have been read: the tile asks for what it has.
                const bool more = std::is_same_v<Real, float> && row + 2 * rows <= segment.rows;
                const float* next = more ? weight + rows * columns : weight;
                for (int c = 0; c < plan.count; ++c) {
                    const Chunk& chunk = plan.chunks[c];
                    const float* input = x + chunk.first * columns;
                    (whole ? chunk.tile : chunk.single)(input, columns, weight, next, sums);
                    for (int64_t m = 0; m < chunk.count; ++m)
                        put(segment, chunk.first + m, row, rows, sums + m * rows);
                }
            }
        }
        place += here;
    }
}

}  // namespace umv2
"""
