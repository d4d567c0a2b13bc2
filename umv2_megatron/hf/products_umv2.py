"""C++ of the products of a step of decoding (``native_umv2`` calls it): few rows times a weight as it lies in memory.

A product y [M, N] = x [M, K] W' reads W [N, K] once, several rows of it side by side, and asks for the rows of the
next tile while it computes with these. So up to a few rows of x it takes the time that reading W takes. Nothing is
packed but x. Kinds of tiles, whichever has the registers for M:

    dot        lanes along K, M x NB sums that are added up over the lanes in the end: for the smallest M
    broadcast  lanes along M, x transposed, each lane of W with all lanes of x: from there on
    paired     the same with two columns of x in a vector: for M that fill half of its lanes (AVX-512)

A lane of 32 bits holds a float32 number, or two bfloat16 numbers of neighbouring columns where the CPU multiplies and
adds up these at once (avx512_bf16: AMD since Zen 4, Intel with AMX, Cooper Lake); there a column of tiles is two of W.
Other CPUs widen bfloat16 weights to float32 first, a tile at a time.

It is a text in a Python file because transformers copies only these with a model.
"""

PRODUCTS = r"""
// Products of few rows with a weight [N, K].

#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace umv2 {

constexpr int64_t LARGEST_BATCH = 64;
constexpr int64_t LINE = 16;  // floats of a cache line
template <typename Real>
constexpr int64_t LINE_OF = 64 / sizeof(Real);

// What the lanes of a product hold; a float stands for the 32 bits of a lane. `lane` is that of x's columns
// [i * COLUMNS, (i + 1) * COLUMNS), `weights` the lanes of `count` of them.
struct OneFloat {
    static constexpr int64_t COLUMNS = 1;

    static Vector add_product(Vector sum, Vector one, Vector other) { return sum + one * other; }
    static Vector add_product(Vector sum, float one, Vector other) { return sum + one * other; }
    static float product(float one, float other) { return one * other; }
    static float lane(const float* x, int64_t i) { return x[i]; }
    static const float* weights(const float* w, int64_t, std::vector<float>&) { return w; }
    static const float* weights(const Half* w, int64_t count, std::vector<float>& spare) {
        if (spare.size() < static_cast<size_t>(count)) spare.resize(static_cast<size_t>(count));
        widen(w, count, spare.data());
        return spare.data();
    }
};

#if defined(__AVX512BF16__)
struct TwoHalves {  // x is rounded to bfloat16; products and sums are float32, below 1e-38 they are 0
    static constexpr int64_t COLUMNS = 2;

    static Vector add_product(Vector sum, Vector one, Vector other) {
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)one, (__m512bh)other);
    }
    static Vector add_product(Vector sum, float one, Vector other) {
        return add_product(sum, (Vector)_mm512_set1_ps(one), other);
    }
    static float product(float one, float other) {
        Half ones[2], others[2];
        std::memcpy(ones, &one, sizeof one);
        std::memcpy(others, &other, sizeof other);
        return value_of(ones[0]) * value_of(others[0]) + value_of(ones[1]) * value_of(others[1]);
    }
    static float lane(const float* x, int64_t i) {
        Half halves[2];
        put_value(x[2 * i], halves);
        put_value(x[2 * i + 1], halves + 1);
        float result;
        std::memcpy(&result, halves, sizeof result);
        return result;
    }
    static const float* weights(const Half* w, int64_t, std::vector<float>&) {
        return reinterpret_cast<const float*>(w);
    }
};
#endif

#if defined(__AVX512F__)
constexpr int DOT_BATCH = 8, WIDE = 8;  // rows of x up to which dots are computed; rows of W beside two vectors of x
#elif defined(__AVX__)
constexpr int DOT_BATCH = 4, WIDE = 6;
#else
constexpr int DOT_BATCH = 4, WIDE = 6;
#endif
constexpr int NARROW = 12;  // rows of W beside one vector of x

// sums [MB][NB] of MB rows of x and NB rows of W; `next` is what is read after them. Columns are lanes here and below.
template <typename Lane, int MB, int NB>
void dot_tile(const float* x, int64_t columns, const float* w, const float* next, float* sums) {
    Vector total[NB][MB];
    for (auto& row : total)
        for (auto& sum : row) sum = Vector{};  // one by one: they live in registers
    int64_t k = 0;
    for (; k + LANES <= columns; k += LANES) {
        Vector rows[NB];
        for (int n = 0; n < NB; ++n) {
            rows[n] = load(w + n * columns + k);
            __builtin_prefetch(next + n * columns + k, 0, 2);  // to the second level of cache
        }
        for (int m = 0; m < MB; ++m) {
            const Vector one = load(x + m * columns + k);
            for (int n = 0; n < NB; ++n) total[n][m] = Lane::add_product(total[n][m], rows[n], one);
        }
    }
    for (int n = 0; n < NB; ++n)
        for (int m = 0; m < MB; ++m) {
            float sum = sum_of(total[n][m]);
            for (int64_t rest = k; rest < columns; ++rest)
                sum += Lane::product(w[n * columns + rest], x[m * columns + rest]);
            sums[m * NB + n] = sum;
        }
}

// sums [MV * LANES][NB]; x is transposed, [K][MV * LANES].
template <typename Lane, int MV, int NB>
void broadcast_tile(const float* x, int64_t columns, const float* w, const float* next, float* sums) {
    Vector total[NB][MV];
    for (auto& row : total)
        for (auto& sum : row) sum = Vector{};
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
        Vector ones[MV];
        for (int m = 0; m < MV; ++m) ones[m] = load(x + (k * MV + m) * LANES);
        for (int n = 0; n < NB; ++n) {
            const float number = w[n * columns + k];
            for (int m = 0; m < MV; ++m) total[n][m] = Lane::add_product(total[n][m], number, ones[m]);
        }
    };
    int64_t k = 0;
    for (; k + LINE <= columns; k += LINE) {
        // x and the rows at hand need the first level of cache.
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
template <typename Lane, int NB>
void paired_tile(const float* x, int64_t columns, const float* w, const float* next, float* sums) {
    Vector total[NB];
    for (auto& sum : total) sum = Vector{};
    int64_t k = 0;
    const auto step = [&](int64_t at) __attribute__((always_inline)) {
        const Vector ones = load(x + at * PAIRED_BATCH);
        for (int n = 0; n < NB; ++n) {
            double pair;
            std::memcpy(&pair, w + n * columns + at, sizeof pair);
            total[n] = Lane::add_product(total[n], (Vector)_mm512_castpd_ps(_mm512_set1_pd(pair)), ones);
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

template <typename Lane>
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
            chunks[count++] = {0, batch, PAIRED_BATCH, paired_tile<Lane, NARROW>, paired_tile<Lane, 1>};
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
                chunks[count++] = {first, left, LANES, broadcast_tile<Lane, 1, NARROW>, broadcast_tile<Lane, 1, 1>};
            else if (left <= LANES)
                chunks[count++] = {first, left, LANES, broadcast_tile<Lane, 1, WIDE>, broadcast_tile<Lane, 1, 1>};
            else
                chunks[count++] = {first, left, 2 * LANES, broadcast_tile<Lane, 2, WIDE>, broadcast_tile<Lane, 2, 1>};
        }
    }

  private:
    template <int MB, int NB>
    void dots() {
        rows = NB;
        chunks[count++] = {0, MB, MB, dot_tile<Lane, MB, NB>, dot_tile<Lane, MB, 1>};
    }
    void dots(int64_t batch) {
        switch (batch) {
#if defined(__AVX512F__)
            case 1: return dots<1, 8>();
            case 2: return dots<2, 8>();
            case 3: return dots<3, 8>();
            case 4: return dots<4, 8>();
            case 5: return dots<5, 2>();
            case 6: return dots<6, 2>();
            case 7: return dots<7, 2>();
            case 8: return dots<8, 2>();
#else
            case 1: return dots<1, 6>();
            case 2: return dots<2, 6>();
            case 3: return dots<3, 4>();
            case 4: return dots<4, 3>();
#endif
        }
    }
};

// Lanes of rows of x [M, K]: a chunk's [columns][width], or [columns / 2][width][2] of it (paired), or row by row.
template <typename Lane>
void pack_chunk(const Team& team, const Chunk& chunk, bool paired, int64_t columns, const float* x, float* to) {
    const int64_t together = paired ? 2 : 1;
    for (int64_t k = team.begin(columns / together) * together; k < team.end(columns / together) * together; ++k)
        for (int64_t m = 0; m < chunk.width; ++m)
            to[(k / together * chunk.width + m) * together + k % together] =
                m < chunk.count ? Lane::lane(x + (chunk.first + m) * columns * Lane::COLUMNS, k) : 0;
}
template <typename Lane>
void pack_rows(const Team& team, int64_t batch, int64_t columns, const float* x, float* to) {
    for (int64_t i = team.begin(batch * columns); i < team.end(batch * columns); ++i) to[i] = Lane::lane(x, i);
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

// As `multiply` of tiles.h, which calls it; K is a multiple of a lane's columns.
template <typename Lane, typename Real>
void multiply_by_vectors(const Team& team, int64_t batch, int64_t numbers, const float* x, float* packed,
                         const Segment<Real>* segments, int count) {
    const int64_t columns = numbers / Lane::COLUMNS;
    const Plan<Lane> plan(batch, columns);
    if (plan.transposed) {
        for (int c = 0; c < plan.count; ++c) {
            const Chunk& chunk = plan.chunks[c];
            pack_chunk<Lane>(team, chunk, plan.paired, columns, x, packed + chunk.first * columns);
        }
    } else if (Lane::COLUMNS > 1) {
        pack_rows<Lane>(team, batch, columns, x, packed);
    }
    if (plan.transposed || Lane::COLUMNS > 1) {
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
                const Real* given = segment.weight + row * numbers;
                const float* weight = Lane::weights(given, rows * numbers, spare);
                // Numbers that have been widened have been read: the tile asks for what it has.
                const bool more = Lane::COLUMNS * sizeof(Real) == sizeof(float) && row + 2 * rows <= segment.rows;
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
