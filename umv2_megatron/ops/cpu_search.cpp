// The two-stage search for CPUs; cpu_search.py calls it, search.py says what it computes.
//
// A token and head are searched by one thread, in buffers that stay in its cache: neither the summed scores of all keys
// nor the grids of cells are ever as large as the batch. hf/selection_umv2.py finds the best of some scores.
//
// Real: float or double. Letters: T tokens, h heads, N keys per side, R rank, C cores, K' keys kept per side, K cells
// kept. key_scores is [2, R, T, h, N]; side 0 is the row.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "selection.h"
#include "cpu_threads.h"

namespace {

using umv2::Selection;

constexpr int64_t PLACES_PER_THREAD = 16;  // (token, head) pairs; fewer do not pay for waking a thread
constexpr int64_t BLOCK = 64;        // tokens whose gradients of the cores are added up before they meet others

struct Sizes {  // as in cpu_search.py
    int64_t rank, tokens, heads, keys, kept, topk, cores, threads;

    int64_t places() const { return tokens * heads; }
    // Where the scores of (side, r, place) begin.
    int64_t at(int64_t side, int64_t r, int64_t place) const { return ((side * rank + r) * places() + place) * keys; }
};

// vectors [2, h, R], found [2, T, h, K'].
template <typename Real>
void best_keys(const Sizes& z, const Real* key_scores, const Real* vectors, int64_t* found) {
    umv2::in_parallel(z.threads, z.places(), PLACES_PER_THREAD, [&](int64_t part, int64_t parts) {
        Selection<Real> selection;
        std::vector<Real> summed(static_cast<size_t>(z.keys));
        Real* sum = summed.data();
        for (int64_t place = z.places() * part / parts; place < z.places() * (part + 1) / parts; ++place)
            for (int64_t side = 0; side < 2; ++side) {
                const Real* factors = vectors + (side * z.heads + place % z.heads) * z.rank;
                std::fill(summed.begin(), summed.end(), Real(0));
                for (int64_t r = 0; r < z.rank; ++r) {
                    const Real factor = factors[r];
                    const Real* scores = key_scores + z.at(side, r, place);
#pragma omp simd
                    for (int64_t n = 0; n < z.keys; ++n) sum[n] += factor * scores[n];
                }
                int64_t* to = found + (side * z.places() + place) * z.kept;
                std::copy_n(selection.best(sum, z.keys, z.kept), z.kept, to);
            }
    });
}

// keys [2, T, h, K'], cores [h, R, R] (their sum), rows and columns [T, h, K].
template <typename Real>
void best_cells(const Sizes& z, const Real* key_scores, const int64_t* keys, const Real* cores, int64_t* rows,
                int64_t* columns) {
    umv2::in_parallel(z.threads, z.places(), PLACES_PER_THREAD, [&](int64_t part, int64_t parts) {
        Selection<Real> selection;
        std::vector<Real> right(static_cast<size_t>(z.rank * z.kept)), grid(static_cast<size_t>(z.kept * z.kept));
        for (int64_t place = z.places() * part / parts; place < z.places() * (part + 1) / parts; ++place) {
            const int64_t *row_keys = keys + place * z.kept, *column_keys = row_keys + z.places() * z.kept;
            const Real* core = cores + place % z.heads * z.rank * z.rank;
            for (int64_t s = 0; s < z.rank; ++s)
                for (int64_t j = 0; j < z.kept; ++j)
                    right[static_cast<size_t>(s * z.kept + j)] = key_scores[z.at(1, s, place) + column_keys[j]];
            std::fill(grid.begin(), grid.end(), Real(0));
            for (int64_t i = 0; i < z.kept; ++i) {
                Real* cells = grid.data() + i * z.kept;
                for (int64_t s = 0; s < z.rank; ++s) {
                    Real left = 0;
                    for (int64_t r = 0; r < z.rank; ++r)
                        left += core[r * z.rank + s] * key_scores[z.at(0, r, place) + row_keys[i]];
                    const Real* scores = right.data() + s * z.kept;
#pragma omp simd
                    for (int64_t j = 0; j < z.kept; ++j) cells[j] += left * scores[j];
                }
            }
            int64_t picked = place * z.topk;
            const int32_t* cells = selection.best(grid.data(), z.kept * z.kept, z.topk);
            for (int64_t k = 0; k < z.topk; ++k, ++picked) {
                rows[picked] = row_keys[cells[k] / z.kept];
                columns[picked] = column_keys[cells[k] % z.kept];
            }
        }
    });
}

// rows and columns [T, h, K]; cores [C, h, R, R]; picked [2, R, T, h, K] gets the key scores of the picks, scores
// [T, h, K, C] their cells' scores.
template <typename Real>
void cell_scores(const Sizes& z, const Real* key_scores, const int64_t* rows, const int64_t* columns,
                 const Real* cores, Real* picked, Real* scores) {
    umv2::in_parallel(z.threads, z.places(), PLACES_PER_THREAD, [&](int64_t part, int64_t parts) {
        const int64_t side_stride = z.rank * z.places() * z.topk, rank_stride = z.places() * z.topk;
        for (int64_t place = z.places() * part / parts; place < z.places() * (part + 1) / parts; ++place) {
            const int64_t head = place % z.heads;
            for (int64_t side = 0; side < 2; ++side) {
                const int64_t* chosen = (side ? columns : rows) + place * z.topk;
                for (int64_t r = 0; r < z.rank; ++r) {
                    const Real* from = key_scores + z.at(side, r, place);
                    Real* to = picked + side * side_stride + r * rank_stride + place * z.topk;
                    for (int64_t k = 0; k < z.topk; ++k) to[k] = from[chosen[k]];
                }
            }
            const Real* left = picked + place * z.topk;
            const Real* right = left + side_stride;
            for (int64_t k = 0; k < z.topk; ++k)
                for (int64_t c = 0; c < z.cores; ++c) {
                    const Real* core = cores + (c * z.heads + head) * z.rank * z.rank;
                    Real sum = 0;
                    for (int64_t r = 0; r < z.rank; ++r)
                        for (int64_t s = 0; s < z.rank; ++s)
                            sum += left[r * rank_stride + k] * core[r * z.rank + s] * right[s * rank_stride + k];
                    scores[(place * z.topk + k) * z.cores + c] = sum;
                }
        }
    });
}

// grad [T, h, K, C] and picked from the forward; key_grad [2, R, T, h, N] is written whole, core_grads
// [blocks, C, h, R, R] holds zeros and gets the sums of every BLOCK tokens.
template <typename Real>
void cell_scores_backward(const Sizes& z, const Real* grad, const int64_t* rows, const int64_t* columns,
                          const Real* cores, const Real* picked, Real* key_grad, Real* core_grads) {
    const int64_t blocks = (z.tokens + BLOCK - 1) / BLOCK, square = z.rank * z.rank;
    const int64_t side_stride = z.rank * z.places() * z.topk, rank_stride = z.places() * z.topk;
    umv2::in_parallel(z.threads, blocks, 1, [&](int64_t part, int64_t parts) {
        for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
            const int64_t stop = std::min(z.places(), (block + 1) * BLOCK * z.heads);
            for (int64_t place = block * BLOCK * z.heads; place < stop; ++place) {
                const int64_t head = place % z.heads;
                for (int64_t side = 0; side < 2; ++side)
                    for (int64_t r = 0; r < z.rank; ++r)
                        std::fill_n(key_grad + z.at(side, r, place), z.keys, Real(0));
                for (int64_t k = 0; k < z.topk; ++k) {
                    const int64_t pick = place * z.topk + k, row = rows[pick], column = columns[pick];
                    const Real *left = picked + pick, *right = left + side_stride;
                    for (int64_t c = 0; c < z.cores; ++c) {
                        const int64_t matrix = (c * z.heads + head) * square;
                        const Real *core = cores + matrix, upstream = grad[pick * z.cores + c];
                        Real* core_grad = core_grads + block * z.cores * z.heads * square + matrix;
                        for (int64_t r = 0; r < z.rank; ++r)
                            for (int64_t s = 0; s < z.rank; ++s) {
                                const Real l = left[r * rank_stride], t = right[s * rank_stride];
                                const Real weight = upstream * core[r * z.rank + s];
                                key_grad[z.at(0, r, place) + row] += weight * t;
                                key_grad[z.at(1, s, place) + column] += weight * l;
                                core_grad[r * z.rank + s] += upstream * l * t;
                            }
                    }
                }
            }
        }
    });
}

}  // namespace

// In every function `wide` says that numbers are double and not float. Indices are trusted: they are the search's own.
extern "C" {

#define EITHER(call) \
    if (wide) {      \
        using Real = double; \
        call;        \
    } else {         \
        using Real = float; \
        call;        \
    }
#define IN(name) static_cast<const Real*>(name)
#define OUT(name) static_cast<Real*>(name)

void umv2_best_keys(const Sizes* sizes, int wide, const void* key_scores, const void* vectors, int64_t* found) {
    EITHER(best_keys(*sizes, IN(key_scores), IN(vectors), found))
}

void umv2_best_cells(const Sizes* sizes, int wide, const void* key_scores, const int64_t* keys, const void* cores,
                     int64_t* rows, int64_t* columns) {
    EITHER(best_cells(*sizes, IN(key_scores), keys, IN(cores), rows, columns))
}

void umv2_cell_scores(const Sizes* sizes, int wide, const void* key_scores, const int64_t* rows,
                      const int64_t* columns, const void* cores, void* picked, void* scores) {
    EITHER(cell_scores(*sizes, IN(key_scores), rows, columns, IN(cores), OUT(picked), OUT(scores)))
}

void umv2_cell_scores_backward(const Sizes* sizes, int wide, const void* grad, const int64_t* rows,
                               const int64_t* columns, const void* cores, const void* picked, void* key_grad,
                               void* core_grads) {
    EITHER(cell_scores_backward(*sizes, IN(grad), rows, columns, IN(cores), IN(picked), OUT(key_grad),
                                OUT(core_grads)))
}

int64_t umv2_search_block() { return BLOCK; }

}  // extern "C"
