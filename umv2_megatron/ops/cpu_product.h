// Small matrix products of the kernels for CPUs, in float: sums stay in registers, operands in cache.

#pragma once

#include <cstdint>
#include <cstring>

namespace umv2 {

#if defined(__AVX512F__)
constexpr int64_t VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int64_t VECTOR_BYTES = 32;
#else
constexpr int64_t VECTOR_BYTES = 16;
#endif
constexpr int64_t LANES = VECTOR_BYTES / sizeof(float);
typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));

// Columns of a panel, and rows at once: 24 sums in 32 registers, or 12 in 16.
constexpr int64_t PANEL_VECTORS = VECTOR_BYTES == 64 ? 3 : 2, PANEL = PANEL_VECTORS * LANES;
constexpr int64_t PANEL_ROWS = VECTOR_BYTES == 64 ? 8 : 6;

// The number in all lanes: one load. `Vector{} + number` would add, because -0 + 0 is not -0.
inline void spread(Vector& to, float number) { to = number - Vector{}; }
inline void load(Vector& to, const float* from) { std::memcpy(&to, from, sizeof to); }
inline void store(float* to, const Vector& vector) { std::memcpy(to, &vector, sizeof vector); }

// An operand on the left: element (row, d) is at data[row * row_stride + d * depth_stride].
struct Left {
    const float* data;
    int64_t row_stride, depth_stride;

    Left from(int64_t row) const { return {data + row * row_stride, row_stride, depth_stride}; }
};

// out [ROWS, V * LANES] = or += left [ROWS, depth] times right [depth, V * LANES], `width` and `right_width` from row to row
// of out and right. Every sum runs over the depth in order, so it does not depend on ROWS and V.
template <int64_t ROWS, int64_t V, bool ADD>
inline void tile(const Left& left, const float* right, int64_t right_width, int64_t depth, float* out, int64_t width) {
    Vector sum[ROWS][V] = {};
    if (ADD)
        for (int64_t i = 0; i < ROWS; ++i)
            for (int64_t v = 0; v < V; ++v) load(sum[i][v], out + i * width + v * LANES);
    for (int64_t d = 0; d < depth; ++d) {
        Vector columns[V], factor;
        for (int64_t v = 0; v < V; ++v) load(columns[v], right + d * right_width + v * LANES);
        for (int64_t i = 0; i < ROWS; ++i) {
            spread(factor, left.data[i * left.row_stride + d * left.depth_stride]);
            for (int64_t v = 0; v < V; ++v) sum[i][v] += factor * columns[v];
        }
    }
    for (int64_t i = 0; i < ROWS; ++i)
        for (int64_t v = 0; v < V; ++v) store(out + i * width + v * LANES, sum[i][v]);
}

// The same for any number of rows.
template <int64_t ROWS, int64_t V, bool ADD>
inline void tiles(const Left& left, int64_t rows, const float* right, int64_t right_width, int64_t depth, float* out,
                  int64_t width) {
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS)
        tile<ROWS, V, ADD>(left.from(i), right, right_width, depth, out + i * width, width);
    for (; i < rows; ++i) tile<1, V, ADD>(left.from(i), right, right_width, depth, out + i * width, width);
}

// out [rows, columns] = or += left [rows, depth] times right [depth, columns]; columns are a multiple of LANES.
template <bool ADD>
inline void product(const Left& left, int64_t rows, const float* right, int64_t right_width, int64_t depth, float* out,
                    int64_t width, int64_t columns) {
    constexpr int64_t WIDE = VECTOR_BYTES == 64 ? 4 : 2, WIDE_ROWS = 6;
    int64_t column = 0;
    for (; column + WIDE * LANES <= columns; column += WIDE * LANES)
        tiles<WIDE_ROWS, WIDE, ADD>(left, rows, right + column, right_width, depth, out + column, width);
    for (; column < columns; column += LANES)
        tiles<WIDE_ROWS, 1, ADD>(left, rows, right + column, right_width, depth, out + column, width);
}

// The same where right lies in panels [panels, depth, PANEL]; writes whole panels.
inline void panel_product(const Left& left, int64_t rows, const float* panels, int64_t count, int64_t depth, float* out,
                          int64_t width) {
    for (int64_t p = 0; p < count; ++p)
        tiles<PANEL_ROWS, PANEL_VECTORS, false>(left, rows, panels + p * depth * PANEL, PANEL, depth, out + p * PANEL, width);
}

}  // namespace umv2
