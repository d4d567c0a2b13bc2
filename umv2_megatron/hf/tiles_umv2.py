"""C++ of products by the matrix tiles of Intel CPUs (AMX), and the choice between them and vectors (``products_umv2``).

A tile multiplies 16 x 32 numbers of W with 32 x 16 of x in bfloat16 and adds up in float32: weights in bfloat16 go into
tiles as they lie, x is packed once. Float32 weights are multiplied by vectors: three bfloat16 parts of each number give
the float32 product, too, but making them takes longer than the vectors do (docs/notes/performance.md).

Operations on numbers below 1e-38 give 0, as on all tiles.

It is a text in a Python file because transformers copies only these with a model.
"""

TILES = r"""
// Few rows times a weight [N, K]: by tiles where the CPU and the system have them, by vectors otherwise, of bfloat16
// pairs where the CPU multiplies these.

#pragma once

#include <type_traits>

#include "products.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define UMV2_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace umv2 {

#if defined(UMV2_TILES)

constexpr int64_t SIDE = 16, DEPTH = 32, TILE = SIDE * DEPTH;  // rows, columns and numbers of a tile of W

typedef uint16_t Bits;  // of a bfloat16 number

// Linux gives a process tiles when it asks for them.
inline bool tiles_allowed() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return allowed;
}

struct alignas(64) TileSizes {  // what ldtilecfg reads: eight tiles of 16 lines
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t lines[16] = {};
    TileSizes() {
        for (int i = 0; i < 8; ++i) bytes[i] = 64, lines[i] = SIDE;
    }
};

// The compiler's own functions take only literal numbers of tiles.
template <int T>
void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
void tile_load(const Bits* from, int64_t bytes = 2 * DEPTH) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(T) : "memory");
}
template <int T>
void tile_store(float* to, int64_t bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(T) : "memory");
}
template <int C, int A, int B>
void tile_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// to [16][16] = from' [16][16]
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    __m512 one[SIDE], two[SIDE];
    for (int i = 0; i < SIDE; ++i) one[i] = _mm512_loadu_ps(from + i * from_stride);
    for (int i = 0; i < SIDE; i += 2) {
        two[i] = _mm512_unpacklo_ps(one[i], one[i + 1]);
        two[i + 1] = _mm512_unpackhi_ps(one[i], one[i + 1]);
    }
    for (int i = 0; i < SIDE; i += 4)
        for (int j = 0; j < 2; ++j) {
            const __m512d low = _mm512_castps_pd(two[i + j]), high = _mm512_castps_pd(two[i + j + 2]);
            one[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            one[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    for (int i = 0; i < SIDE; i += 8)
        for (int j = 0; j < 4; ++j) {
            two[i + j] = _mm512_shuffle_f32x4(one[i + j], one[i + j + 4], 0x88);
            two[i + j + 4] = _mm512_shuffle_f32x4(one[i + j], one[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        _mm512_storeu_ps(to + j * to_stride, _mm512_shuffle_f32x4(two[j], two[j + 8], 0x88));
        _mm512_storeu_ps(to + (j + 8) * to_stride, _mm512_shuffle_f32x4(two[j], two[j + 8], 0xdd));
    }
}

inline __m512 upper(__m512 x) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(-0x10000)));
}
inline __m512 rounded(__m512 x) {  // to bfloat16, halves to even
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return upper(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff))));
}
// The upper halves of both, in turns: what a tile takes for one column of each.
inline __m512i paired(__m512 one, __m512 other) {
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(_mm512_castps_si512(one), 16), _mm512_castps_si512(other),
                                     _mm512_set1_epi32(-0x10000), 0xf8);  // first | (second & third)
}

struct Columns {  // of 32, those that there are
    __mmask16 low = 0xffff, high = 0xffff;
    explicit Columns(int64_t count) {
        if (count < DEPTH) {
            low = static_cast<__mmask16>((1u << std::min<int64_t>(count, 16)) - 1);
            high = static_cast<__mmask16>((1u << std::max<int64_t>(count - 16, 0)) - 1);
        }
    }
};

// Sums in tiles 0 to 3, of two tiles of W and two of x, for more than 16 rows of x.
struct Square {
    static constexpr int W_TILES = 2, X_TILES = 2;

    static void multiply(const Half* w, int64_t columns, const Bits* x) {
        tile_load<4>(bits(w), 2 * columns), tile_load<5>(bits(w + SIDE * columns), 2 * columns);
        tile_load<6>(x), tile_load<7>(x + TILE);
        tile_product<0, 4, 6>(), tile_product<1, 4, 7>(), tile_product<2, 5, 6>(), tile_product<3, 5, 7>();
    }
};

// The same of four tiles of W and one of x, for up to 16 rows.
struct Tower {
    static constexpr int W_TILES = 4, X_TILES = 1;

    static void multiply(const Half* w, int64_t columns, const Bits* x) {
        const int64_t next = SIDE * columns, bytes = 2 * columns;
        tile_load<7>(x);
        tile_load<4>(bits(w), bytes), tile_product<0, 4, 7>(), tile_load<5>(bits(w + next), bytes);
        tile_product<1, 5, 7>(), tile_load<6>(bits(w + 2 * next), bytes), tile_product<2, 6, 7>();
        tile_load<4>(bits(w + 3 * next), bytes), tile_product<3, 4, 7>();
    }
};

template <typename Shape>
constexpr int64_t ROWS = Shape::W_TILES * SIDE;

// Sums of W [rows of the shape, K] with packed x, in tiles; `next` is what is read after it.
template <typename Shape>
void add_up(const Half* w, int64_t columns, const Half* next, const Bits* x, Bits* spare) {
    constexpr int64_t STEP = Shape::X_TILES * TILE;
    const int64_t whole = columns / DEPTH * DEPTH;
    for (int64_t k = 0; k < whole; k += DEPTH, x += STEP) {
        // Half of the rows in turn, two lines of each: lines come from memory faster beside their neighbours.
        const int64_t first = k / DEPTH % 2 * (ROWS<Shape> / 2), place = k / (2 * DEPTH) * 2 * DEPTH;
        for (int64_t n = first; n < first + ROWS<Shape> / 2; ++n) {
            __builtin_prefetch(next + n * columns + place, 0, 2);
            __builtin_prefetch(next + n * columns + place + DEPTH, 0, 2);
        }
        Shape::multiply(w + k, columns, x);
    }
    if (whole == columns) return;
    for (int64_t n = 0; n < ROWS<Shape>; ++n)
        for (int64_t k = 0; k < DEPTH; ++k)
            spare[n * DEPTH + k] = whole + k < columns ? *bits(w + n * columns + whole + k) : 0;
    Shape::multiply(reinterpret_cast<const Half*>(spare), DEPTH, x);
}

template <int T, typename Shape>
void clear_sums() {
    if constexpr (T < Shape::W_TILES * Shape::X_TILES) tile_zero<T>(), clear_sums<T + 1, Shape>();
}
// sums [rows of x, rows of W]
template <int T, typename Shape>
void take_sums(float* sums) {
    if constexpr (T < Shape::W_TILES * Shape::X_TILES) {
        alignas(64) float turned[SIDE * SIDE];
        tile_store<T>(turned, SIDE * sizeof(float));
        constexpr int64_t w = T / Shape::X_TILES, x = T % Shape::X_TILES;
        transpose(turned, SIDE, sums + x * SIDE * ROWS<Shape> + w * SIDE, ROWS<Shape>);
        take_sums<T + 1, Shape>(sums);
    }
}

// x [M, K] in bfloat16 [rows of the shape][K / 32][tiles][16 pairs of columns][16][2], zeros where there are none.
template <typename Shape>
void pack_tiles(const Team& team, int64_t batch, int64_t columns, const float* x, Bits* to) {
    constexpr int64_t TOGETHER = Shape::X_TILES * SIDE;
    const int64_t blocks = (columns + DEPTH - 1) / DEPTH, chunks = (batch + TOGETHER - 1) / TOGETHER;
    const int64_t tiles = chunks * blocks * Shape::X_TILES;
    const __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    alignas(64) float lines[SIDE * SIDE];
    for (int64_t i = team.begin(tiles); i < team.end(tiles); ++i) {
        const int64_t chunk = i / (blocks * Shape::X_TILES), k = i / Shape::X_TILES % blocks * DEPTH;
        const int64_t first = chunk * TOGETHER + i % Shape::X_TILES * SIDE;
        const Columns there(columns - k);
        for (int64_t m = 0; m < SIDE; ++m) {
            __m512 low = _mm512_setzero_ps(), high = low;
            if (first + m < batch) {
                low = _mm512_maskz_loadu_ps(there.low, x + (first + m) * columns + k);
                high = _mm512_maskz_loadu_ps(there.high, x + (first + m) * columns + k + 16);
            }
            const __m512 even = rounded(_mm512_permutex2var_ps(low, evens, high));
            const __m512 odd = rounded(_mm512_permutex2var_ps(low, odds, high));
            _mm512_store_ps(lines + m * SIDE, _mm512_castsi512_ps(paired(even, odd)));
        }
        transpose(lines, SIDE, reinterpret_cast<float*>(to + i * TILE), SIDE);
    }
}

template <typename Shape>
void multiply_by_tiles(const Team& team, int64_t batch, int64_t columns, const float* x, float* packed,
                       const Segment<Half>* segments, int count) {
    constexpr int64_t TOGETHER = Shape::X_TILES * SIDE, HEIGHT = ROWS<Shape>;
    static const TileSizes sizes;
    auto* halves = reinterpret_cast<Bits*>(packed);
    pack_tiles<Shape>(team, batch, columns, x, halves);
    team.wait();
    const int64_t packed_rows = (columns + DEPTH - 1) / DEPTH * Shape::X_TILES * TILE;
    alignas(64) float sums[TOGETHER * HEIGHT];
    alignas(64) Bits spare[Shape::W_TILES * TILE];
    int64_t tiles = 0, place = 0;
    for (int s = 0; s < count; ++s) tiles += (segments[s].rows + HEIGHT - 1) / HEIGHT;
    const int64_t begin = team.begin(tiles), end = team.end(tiles);
    asm volatile("ldtilecfg %0" ::"m"(sizes));
    for (int s = 0; s < count; ++s) {
        const Segment<Half>& segment = segments[s];
        const int64_t here = (segment.rows + HEIGHT - 1) / HEIGHT;
        for (int64_t tile = std::max(begin, place) - place; tile < here && place + tile < end; ++tile) {
            // The last tile ends with the last row; what another one has, too, is not written twice.
            const int64_t row = std::min(tile * HEIGHT, segment.rows - HEIGHT), skipped = tile * HEIGHT - row;
            const Half* weight = segment.weight + row * columns;
            const Half* next = row + 2 * HEIGHT <= segment.rows ? weight + HEIGHT * columns : weight;
            for (int64_t first = 0; first < batch; first += TOGETHER) {
                clear_sums<0, Shape>();
                add_up<Shape>(weight, columns, next, halves + first / TOGETHER * packed_rows, spare);
                take_sums<0, Shape>(sums);
                for (int64_t m = 0; m < std::min(TOGETHER, batch - first); ++m)
                    put(segment, first + m, row + skipped, HEIGHT - skipped, sums + m * HEIGHT + skipped);
            }
        }
        place += here;
    }
    asm volatile("tilerelease");
}

template <typename Shape>
bool tiles_fit(const Segment<Half>* segments, int count) {
    for (int s = 0; s < count; ++s)
        if (segments[s].rows < ROWS<Shape>) return false;
    return tiles_allowed();
}

#endif

// Products of x [M, K] with several weights. All threads of the team call it; what they have written to x must be there
// (wait), and out is there after the next wait. `packed` has place for packed_size(K) numbers.
template <typename Real>
void multiply(const Team& team, int64_t batch, int64_t columns, const float* x, float* packed,
              const Segment<Real>* segments, int count) {
#if defined(UMV2_TILES)
    if constexpr (std::is_same_v<Real, Half>) {
        if (batch > SIDE ? tiles_fit<Square>(segments, count) : tiles_fit<Tower>(segments, count)) {
            const auto by_tiles = batch > SIDE ? multiply_by_tiles<Square> : multiply_by_tiles<Tower>;
            return by_tiles(team, batch, columns, x, packed, segments, count);
        }
    }
#endif
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<Real, Half>)
        if (columns % TwoHalves::COLUMNS == 0)
            return multiply_by_vectors<TwoHalves>(team, batch, columns, x, packed, segments, count);
#endif
    multiply_by_vectors<OneFloat>(team, batch, columns, x, packed, segments, count);
}

// Vectors take K * (LARGEST_BATCH + 2 * LANES) numbers at most, tiles half a number for each of K rounded up to 32.
inline int64_t packed_size(int64_t columns) { return (columns + 32) * (LARGEST_BATCH + 2 * LANES); }

}  // namespace umv2
"""
