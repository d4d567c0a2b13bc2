"""C++ of products by the matrix tiles of Intel CPUs (AMX), and the choice between them and vectors (``products_umv2``).

A tile multiplies 16 x 32 numbers of W with 32 x 16 of x in bfloat16 and adds up in float32. A float32 number is the sum
of three bfloat16 numbers, so its product with another one is six products of parts; the three that are left out are
below 2^-23 of the product, which is what float32 rounds anyway. Parts of W are made beside the tiles' work, 32 columns
ahead, and are never in memory; those of x are packed once. Measured (docs/inference.md): for 5 rows of x and more this
takes less time than vectors, and from 17 rows on less than half of it.

Operations on numbers below 1e-38 give 0, as on all tiles; an infinite weight gives NaN.

It is a text in a Python file because transformers copies only these with a model.
"""

TILES = r"""
// Few rows times a weight [N, K]: by tiles where the CPU and the system have them, by vectors otherwise.

#pragma once

#include "products.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define UMV2_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace umv2 {

#if defined(UMV2_TILES)

constexpr int64_t SIDE = 16, DEPTH = 32, TILE = SIDE * DEPTH;  // rows, columns and numbers of a tile of W
constexpr int64_t PARTS = 3;                                   // of a float32 number
constexpr int64_t TILES_FROM = 5;                              // rows of x

typedef uint16_t Part;  // bits of a bfloat16 number

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
void tile_load(const Part* from, int64_t bytes = 2 * DEPTH) {
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

// Rows FIRST to END of tiles of W [16][32] to their parts [3][16][32] each. Column i is the neighbour of column i + 16,
// which needs fewer instructions than that of i + 1. By truncation: parts of 8 bits each are exact.
template <int FIRST, int END>
inline __attribute__((always_inline)) void split_rows(const float* w, int64_t columns, Columns there, Part* to) {
    for (int n = FIRST; n < END; ++n) {
        __m512 one = _mm512_maskz_loadu_ps(there.low, w + n * columns);
        __m512 other = _mm512_maskz_loadu_ps(there.high, w + n * columns + 16);
        for (int64_t part = 0; part < PARTS; ++part) {
            _mm512_store_si512(to + (n / SIDE * PARTS + part) * TILE + n % SIDE * DEPTH, paired(one, other));
            one = _mm512_sub_ps(one, upper(one));
            other = _mm512_sub_ps(other, upper(other));
        }
    }
}

inline void ask_for(const float* rows, int64_t columns, int first, int end) {
    for (int n = first; n < end; ++n) {
        __builtin_prefetch(rows + n * columns, 0, 2);
        __builtin_prefetch(rows + n * columns + LINE, 0, 2);
    }
}

struct Ahead {  // what is done beside the products of 32 columns: the parts of the next ones
    const float *w, *next;
    int64_t columns;
    Columns there;
    Part* to;

    template <int FIRST, int END>
    inline __attribute__((always_inline)) void rows() const {
        split_rows<FIRST, END>(w, columns, there, to);
        ask_for(next, columns, FIRST, END);
    }
};

// Sums in tiles 0 to 3, of two tiles of W and two of x, for more than 16 rows of x.
struct Square {
    static constexpr int W_TILES = 2, X_TILES = 2;

    static void of_w(const Part* w, int part) {
        tile_load<4>(w + part * TILE);
        tile_load<5>(w + (PARTS + part) * TILE);
    }
    static void of_x(const Part* x, int part) {
        tile_load<6>(x + part * TILE);
        tile_load<7>(x + (PARTS + part) * TILE);
    }
    template <int FIRST, int MIDDLE, int END>
    static inline __attribute__((always_inline)) void four(const Ahead& ahead) {
        tile_product<0, 4, 6>();
        ahead.rows<FIRST, MIDDLE>();
        tile_product<1, 4, 7>();
        tile_product<2, 5, 6>();
        ahead.rows<MIDDLE, END>();
        tile_product<3, 5, 7>();
    }
    // Six pairs of parts, the smallest first; each for four sums in turn, so that no product waits for the one before.
    static void multiply(const Part* w, const Part* x, const Ahead& ahead) {
        of_w(w, 0), of_x(x, 2), four<0, 2, 6>(ahead);
        of_x(x, 1), four<6, 8, 12>(ahead);
        of_w(w, 1), four<12, 14, 17>(ahead);
        of_x(x, 0), four<17, 19, 22>(ahead);
        of_w(w, 2), four<22, 24, 27>(ahead);
        of_w(w, 0), four<27, 29, 32>(ahead);
    }
    static void multiply(const Half* w, int64_t columns, const Part* x) {
        tile_load<4>(bits(w), 2 * columns), tile_load<5>(bits(w + SIDE * columns), 2 * columns);
        tile_load<6>(x), tile_load<7>(x + TILE);
        tile_product<0, 4, 6>(), tile_product<1, 4, 7>(), tile_product<2, 5, 6>(), tile_product<3, 5, 7>();
    }
};

// The same of four tiles of W and one of x, for up to 16 rows.
struct Tower {
    static constexpr int W_TILES = 4, X_TILES = 1;

    template <int FIRST, int END>
    static inline __attribute__((always_inline)) void four(const Part* w, const Ahead& ahead) {
        constexpr int64_t NEXT = PARTS * TILE;
        tile_load<4>(w), tile_product<0, 4, 7>();
        ahead.rows<FIRST, (FIRST + END) / 2>();
        tile_load<5>(w + NEXT), tile_product<1, 5, 7>();
        tile_load<6>(w + 2 * NEXT), tile_product<2, 6, 7>();
        ahead.rows<(FIRST + END) / 2, END>();
        tile_load<4>(w + 3 * NEXT), tile_product<3, 4, 7>();
    }
    static void multiply(const Part* w, const Part* x, const Ahead& ahead) {
        tile_load<7>(x + 2 * TILE), four<0, 12>(w, ahead);
        tile_load<7>(x + TILE), four<12, 23>(w + TILE, ahead), four<23, 34>(w, ahead);
        tile_load<7>(x), four<34, 44>(w + 2 * TILE, ahead), four<44, 54>(w + TILE, ahead), four<54, 64>(w, ahead);
    }
    static void multiply(const Half* w, int64_t columns, const Part* x) {
        const int64_t next = SIDE * columns, bytes = 2 * columns;
        tile_load<7>(x);
        tile_load<4>(bits(w), bytes), tile_product<0, 4, 7>(), tile_load<5>(bits(w + next), bytes);
        tile_product<1, 5, 7>(), tile_load<6>(bits(w + 2 * next), bytes), tile_product<2, 6, 7>();
        tile_load<4>(bits(w + 3 * next), bytes), tile_product<3, 4, 7>();
    }
};

template <typename Shape>
constexpr int64_t ROWS = Shape::W_TILES * SIDE;
template <typename Real>
constexpr int64_t PARTS_OF = std::is_same_v<Real, float> ? PARTS : 1;

// Sums of W [rows of the shape, K] with packed x, in tiles; `next` is what is read after it.
template <typename Shape>
void add_up(const float* w, int64_t columns, const float* next, const Part* x, Part* spare) {
    constexpr int64_t PLACE = Shape::W_TILES * PARTS * TILE, STEP = Shape::X_TILES * PARTS * TILE;
    const int64_t blocks = (columns + DEPTH - 1) / DEPTH;
    split_rows<0, ROWS<Shape>>(w, columns, Columns(columns), spare);
    for (int64_t b = 0; b < blocks; ++b, x += STEP) {
        const int64_t k = std::min(b + 1, blocks - 1) * DEPTH;  // after the last block, that again
        const Ahead ahead = {w + k, next + k, columns, Columns(columns - k), spare + (b + 1) % 2 * PLACE};
        Shape::multiply(spare + b % 2 * PLACE, x, ahead);
    }
}

template <typename Shape>
void add_up(const Half* w, int64_t columns, const Half* next, const Part* x, Part* spare) {
    constexpr int64_t STEP = Shape::X_TILES * TILE;
    const int64_t whole = columns / DEPTH * DEPTH;
    for (int64_t k = 0; k < whole; k += DEPTH, x += STEP) {
        for (int64_t n = 0; n < ROWS<Shape>; ++n) __builtin_prefetch(next + n * columns + k, 0, 2);
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

// x [M, K] to parts [rows of the shape][K / 32][tiles][parts][16 pairs of columns][16][2], zeros where there are none.
template <typename Shape, typename Real>
void pack_parts(const Team& team, int64_t batch, int64_t columns, const float* x, Part* to) {
    constexpr int64_t COUNT = PARTS_OF<Real>, TOGETHER = Shape::X_TILES * SIDE;
    const int64_t blocks = (columns + DEPTH - 1) / DEPTH, chunks = (batch + TOGETHER - 1) / TOGETHER;
    const int64_t tiles = chunks * blocks * Shape::X_TILES;
    // The places in a vector of pairs: of float32, columns i and i + 16; of bfloat16, as they lie.
    const __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    alignas(64) float lines[COUNT][SIDE * SIDE];
    for (int64_t i = team.begin(tiles); i < team.end(tiles); ++i) {
        const int64_t chunk = i / (blocks * Shape::X_TILES), k = i / Shape::X_TILES % blocks * DEPTH;
        const int64_t first = chunk * TOGETHER + i % Shape::X_TILES * SIDE;
        const Columns there(columns - k);
        for (int64_t m = 0; m < SIDE; ++m) {
            __m512 one = _mm512_setzero_ps(), other = one;
            if (first + m < batch) {
                one = _mm512_maskz_loadu_ps(there.low, x + (first + m) * columns + k);
                other = _mm512_maskz_loadu_ps(there.high, x + (first + m) * columns + k + 16);
            }
            if (COUNT == 1) {
                const __m512 even = _mm512_permutex2var_ps(one, evens, other);
                other = _mm512_permutex2var_ps(one, odds, other);
                one = even;
            }
            for (int64_t part = 0; part < COUNT; ++part) {
                const __m512 main = rounded(one), main2 = rounded(other);
                _mm512_store_ps(lines[part] + m * SIDE, _mm512_castsi512_ps(paired(main, main2)));
                one = _mm512_sub_ps(one, main);
                other = _mm512_sub_ps(other, main2);
            }
        }
        for (int64_t part = 0; part < COUNT; ++part)
            transpose(lines[part], SIDE, reinterpret_cast<float*>(to + (i * COUNT + part) * TILE), SIDE);
    }
}

template <typename Shape, typename Real>
void multiply_by_tiles(const Team& team, int64_t batch, int64_t columns, const float* x, float* packed,
                       const Segment<Real>* segments, int count) {
    constexpr int64_t TOGETHER = Shape::X_TILES * SIDE, HEIGHT = ROWS<Shape>;
    static const TileSizes sizes;
    auto* parts = reinterpret_cast<Part*>(packed);
    pack_parts<Shape, Real>(team, batch, columns, x, parts);
    team.wait();
    const int64_t packed_rows = (columns + DEPTH - 1) / DEPTH * Shape::X_TILES * PARTS_OF<Real> * TILE;
    alignas(64) float sums[TOGETHER * HEIGHT];
    alignas(64) Part spare[2 * Shape::W_TILES * PARTS * TILE];
    int64_t tiles = 0, place = 0;
    for (int s = 0; s < count; ++s) tiles += (segments[s].rows + HEIGHT - 1) / HEIGHT;
    const int64_t begin = team.begin(tiles), end = team.end(tiles);
    asm volatile("ldtilecfg %0" ::"m"(sizes));
    for (int s = 0; s < count; ++s) {
        const Segment<Real>& segment = segments[s];
        const int64_t here = (segment.rows + HEIGHT - 1) / HEIGHT;
        for (int64_t tile = std::max(begin, place) - place; tile < here && place + tile < end; ++tile) {
            // The last tile ends with the last row; what another one has, too, is not written twice.
            const int64_t row = std::min(tile * HEIGHT, segment.rows - HEIGHT), skipped = tile * HEIGHT - row;
            const Real* weight = segment.weight + row * columns;
            const Real* next = row + 2 * HEIGHT <= segment.rows ? weight + HEIGHT * columns : weight;
            for (int64_t first = 0; first < batch; first += TOGETHER) {
                clear_sums<0, Shape>();
                add_up<Shape>(weight, columns, next, parts + first / TOGETHER * packed_rows, spare);
                take_sums<0, Shape>(sums);
                for (int64_t m = 0; m < std::min(TOGETHER, batch - first); ++m)
                    put(segment, first + m, row + skipped, HEIGHT - skipped, sums + m * HEIGHT + skipped);
            }
        }
        place += here;
    }
    asm volatile("tilerelease");
}

template <typename Real>
bool tiles_fit(int64_t batch, const Segment<Real>* segments, int count) {
    if (PARTS_OF<Real> > 1 && batch < TILES_FROM) return false;
    for (int s = 0; s < count; ++s)
        if (segments[s].rows < (batch > SIDE ? ROWS<Square> : ROWS<Tower>)) return false;
    return tiles_allowed();
}

#endif

// Products of x [M, K] with several weights. All threads of the team call it; what they have written to x must be there
// (wait), and out is there after the next wait. `packed` has place for packed_size(K) numbers.
template <typename Real>
void multiply(const Team& team, int64_t batch, int64_t columns, const float* x, float* packed,
              const Segment<Real>* segments, int count) {
#if defined(UMV2_TILES)
    if (tiles_fit(batch, segments, count)) {
        const auto by_tiles = batch > SIDE ? multiply_by_tiles<Square, Real> : multiply_by_tiles<Tower, Real>;
        return by_tiles(team, batch, columns, x, packed, segments, count);
    }
#endif
    multiply_by_vectors(team, batch, columns, x, packed, segments, count);
}

// Vectors take K * (LARGEST_BATCH + 2 * LANES) numbers at most, tiles three halves for each of K rounded up to 32.
inline int64_t packed_size(int64_t columns) { return (columns + 32) * (LARGEST_BATCH + 2 * LANES + 16); }

}  // namespace umv2
"""
