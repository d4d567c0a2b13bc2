"""C++ of FFN and memory layer for a step of decoding, in one call (``step_umv2``), with their norm and the sum with the
residual; search and lookup can be called alone, for any number of tokens (``lookup_umv2``). What it computes is what
the modules of the same names compute, in float32.

It is a text in a Python file because transformers copies only these with a model.
"""

FEEDFORWARD = r"""
// M sequences of one new token each. Structures as in native_umv2.py.

#pragma once

#include <atomic>
#include <cmath>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <fcntl.h>
#include <unistd.h>
#endif

#include "block.h"
#include "selection.h"

template <typename Real>
struct Memory {
    Linear<Real> query, pre, gate, value;  // with weight null: none
    const Real *query_gain, *key_gain, *keys, *cores;
    const float *u, *t;
    const void* perm;
    const Real *const *values, *const *pre_values;  // of each chunk
    const int32_t *value_files, *pre_files;          // null: rows lie in memory
    const int64_t *value_starts, *pre_starts;        // bytes before each chunk in its file
    int64_t wide_perm, per_rank, heads, num_keys, dim, rank, kept, topk, num_cores, blocks;
    int64_t value_dim, pre_dim, gelu, plain, window, offset, table_rows, chunk_rows, page, fetch;
    float epsilon;
};

template <typename Real>
struct Feedforward {
    Norm<Real> norm;
    Linear<Real> gate, up, down;
    int64_t hidden;
};

namespace {

// query [M, 2 R' Dk] to [M, 2, Dk, R], normalised, with both gains: what the keys are multiplied with as they lie.
template <typename Real>
void expand_queries(const Team& team, const Memory<Real>& y, int64_t batch, const float* query, float* to) {
    const int64_t ranks = y.per_rank ? y.rank : 1;
    for (int64_t i = team.begin(batch * 2); i < team.end(batch * 2); ++i)
        for (int64_t r = 0; r < y.rank; ++r) {
            const float* x = query + (i * ranks + (y.per_rank ? r : 0)) * y.dim;
            const float scale = 1.0f / std::sqrt(dot(x, x, y.dim) / static_cast<float>(y.dim) + y.epsilon);
            float* row = to + i * y.dim * y.rank + r;
            for (int64_t d = 0; d < y.dim; ++d)
                row[d * y.rank] = x[d] * scale * value_of(y.query_gain[d]) * value_of(y.key_gain[d]);
        }
}

// What each rank of a key is multiplied with to normalise it.
template <typename Real>
void key_scales(const Real* key, int64_t width, int64_t rank, int64_t dim, float epsilon, float* scale) {
    Vector squares{};
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES) squares += load(key + k) * load(key + k);
    fold(squares, rank, scale);
    for (int64_t rest = k; rest < width; ++rest) scale[(rest - k) % rank] += value_of(key[rest]) * value_of(key[rest]);
    for (int64_t r = 0; r < rank; ++r)
        scale[r] = 1.0f / std::sqrt(scale[r] / static_cast<float>(dim) + epsilon);
}

// Scores of one key with MB queries: scores[m * stride + r * rank_stride].
template <int MB, int RANK, typename Real>
void score_key(const Real* key, const float* scale, const float* queries, int64_t query_stride, int64_t width,
               float* scores, int64_t stride, int64_t rank_stride) {
    Vector total[MB];
    for (auto& sum : total) sum = Vector{};
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES) {
        const Vector one = load(key + k);
        for (int m = 0; m < MB; ++m) total[m] += one * load(queries + m * query_stride + k);
    }
    for (int m = 0; m < MB; ++m) {
        float sum[4];
        fold(total[m], RANK, sum);
        for (int64_t rest = k; rest < width; ++rest)
            sum[(rest - k) % RANK] += value_of(key[rest]) * queries[m * query_stride + rest];
        for (int r = 0; r < RANK; ++r) scores[m * stride + r * rank_stride] = sum[r] * scale[r];
    }
}

// scores [2, R, M, h, N]
template <int RANK, typename Real>
void score_keys_of(const Team& team, const Memory<Real>& y, int64_t batch, const float* queries, float* scores) {
    const int64_t width = y.dim * y.rank, rank_stride = batch * y.heads * y.num_keys;
    const int64_t keys = y.heads * 2 * y.num_keys, stride = y.heads * y.num_keys;
    constexpr int64_t TOGETHER = 12;  // keys that stay in cache while queries pass by, and these with all of them
    float scales[TOGETHER][4];
    for (int64_t first = team.begin(keys); first < team.end(keys);) {
        const int64_t side = first / y.num_keys % 2, head = first / y.num_keys / 2;
        const int64_t same_side = (first / y.num_keys + 1) * y.num_keys;
        const int64_t stop = std::min({first + TOGETHER, team.end(keys), same_side});
        for (int64_t i = first; i < stop; ++i) {
            for (int64_t l = 0; l < width; l += LINE_OF<Real>) __builtin_prefetch(y.keys + (i + 4) * width + l, 0, 3);
            key_scales(y.keys + i * width, width, y.rank, y.dim, y.epsilon, scales[i - first]);
        }
        float* to = scores + side * y.rank * rank_stride + head * y.num_keys + first % y.num_keys;
        for (int64_t m = 0, count; m < batch; m += count) {
            count = batch - m >= 8 ? 8 : batch - m >= 4 ? 4 : 1;
            const auto kernel = count == 8   ? score_key<8, RANK, Real>
                                : count == 4 ? score_key<4, RANK, Real>
                                             : score_key<1, RANK, Real>;
            for (int64_t i = first; i < stop; ++i)
                kernel(y.keys + i * width, scales[i - first], queries + (m * 2 + side) * width, 2 * width, width,
                       to + i - first + m * stride, stride, rank_stride);
        }
        first = stop;
    }
}

template <typename Real>
void score_keys(const Team& team, const Memory<Real>& y, int64_t batch, const float* queries, float* scores) {
    const auto compute = y.rank == 4   ? score_keys_of<4, Real>
                         : y.rank == 2 ? score_keys_of<2, Real>
                                       : score_keys_of<1, Real>;
    compute(team, y, batch, queries, scores);
}

// The picks of one token and head: cells [K] and their scores [K, C]. key_scores of (side 0, r 0, place).
struct Search {
    Selection<float> selection;
    std::vector<float> summed, right, grid;
    std::vector<int64_t> keys;

    template <typename Real>
    void run(const Memory<Real>& y, const float* key_scores, int64_t rank_stride, int64_t head, int64_t* cells,
             float* scores) {
        const int64_t square = y.rank * y.rank, kept = y.kept;
        const float* sides[2] = {key_scores, key_scores + y.rank * rank_stride};
        keys.resize(static_cast<size_t>(2 * kept));
        summed.resize(static_cast<size_t>(y.num_keys));
        for (int side = 0; side < 2; ++side) {
            const float* factors = (side ? y.t : y.u) + head * y.rank;
            std::fill(summed.begin(), summed.end(), 0.0f);
            for (int64_t r = 0; r < y.rank; ++r)
                add_scaled(summed.data(), factors[r], sides[side] + r * rank_stride, y.num_keys);
            std::copy_n(selection.best(summed.data(), y.num_keys, kept), kept, keys.begin() + side * kept);
        }
        float total[16] = {};
        for (int64_t c = 0; c < y.num_cores; ++c)
            for (int64_t i = 0; i < square; ++i) total[i] += value_of(y.cores[(c * y.heads + head) * square + i]);
        right.resize(static_cast<size_t>(y.rank * kept));
        for (int64_t s = 0; s < y.rank; ++s)
            for (int64_t j = 0; j < kept; ++j)
                right[static_cast<size_t>(s * kept + j)] = sides[1][s * rank_stride + keys[kept + j]];
        grid.assign(static_cast<size_t>(kept * kept), 0.0f);
        for (int64_t i = 0; i < kept; ++i)
            for (int64_t s = 0; s < y.rank; ++s) {
                float left = 0;
                for (int64_t r = 0; r < y.rank; ++r)
                    left += total[r * y.rank + s] * sides[0][r * rank_stride + keys[i]];
                add_scaled(grid.data() + i * kept, left, right.data() + s * kept, kept);
            }
        const int32_t* places = selection.best(grid.data(), kept * kept, y.topk);
        for (int64_t k = 0; k < y.topk; ++k) {
            const int64_t row = keys[places[k] / kept], column = keys[kept + places[k] % kept];
            *cells++ = row * y.num_keys + column;
            for (int64_t c = 0; c < y.num_cores; ++c) {
                const Real* core = y.cores + (c * y.heads + head) * square;
                float sum = 0;
                for (int64_t r = 0; r < y.rank; ++r)
                    for (int64_t s = 0; s < y.rank; ++s)
                        sum += sides[0][r * rank_stride + row] * value_of(core[r * y.rank + s]) *
                               sides[1][s * rank_stride + column];
                *scores++ = sum;
            }
        }
    }
};

// A cell becomes a row of the table and a virtual block. False where the shuffle is none: a file is damaged.
template <typename Real>
bool place_row(const Memory<Real>& y, int64_t cell, int64_t& row, int64_t& block) {
    row = y.wide_perm ? static_cast<const int64_t*>(y.perm)[cell] : static_cast<const int32_t*>(y.perm)[cell];
    block = 0;
    const bool good = static_cast<uint64_t>(row) < static_cast<uint64_t>(y.num_keys * y.num_keys);
    if (!good) row = 0;
    if (!y.plain) {
        const int64_t window = row / y.window;
        row = (row - window * y.window + y.offset) % y.table_rows;
        if (y.blocks > 1) block = window;  // with one projection all add to the same sum
    }
    return good;
}

// Whether the picks of the team's tokens are rows of the table, and blocks that there are.
template <typename Real>
bool inside(const Team& team, const Memory<Real>& y, int64_t batch, const int64_t* rows, const int64_t* blocks) {
    const int64_t picks = y.heads * y.topk;
    bool good = true;
    for (int64_t i = team.begin(batch) * picks; i < team.end(batch) * picks; ++i) {
        good &= static_cast<uint64_t>(rows[i]) < static_cast<uint64_t>(y.table_rows);
        if (blocks) good &= static_cast<uint64_t>(blocks[i]) < static_cast<uint64_t>(y.blocks);
    }
    return good;
}

template <typename Real>
const Real* row_at(const Memory<Real>& y, const Real* const* chunks, int64_t width, int64_t row) {
    return chunks[row / y.chunk_rows] + row % y.chunk_rows * width;
}

template <typename Real>
void prefetch_row(const Real* row, int64_t width) {
    for (int64_t i = 0; i < width; i += LINE_OF<Real>) __builtin_prefetch(row + i, 0, 2);
    __builtin_prefetch(row + width - 1, 0, 2);
}

// Ask for the pages of all rows, in the order of the file, so that they are read side by side while others compute.
template <typename Real>
void fetch_rows(const Team& team, const Memory<Real>& y, const int64_t* rows, int64_t count) {
#if defined(__linux__)
    std::vector<std::pair<int64_t, int64_t>> pages;  // (file, page)
    for (int kind = 0; kind < 2; ++kind) {
        const int64_t bytes = (kind ? y.pre_dim : y.value_dim) * static_cast<int64_t>(sizeof(Real));
        if (!bytes) continue;
        const int32_t* files = kind ? y.pre_files : y.value_files;
        const int64_t* starts = kind ? y.pre_starts : y.value_starts;
        pages.clear();
        for (int64_t i = 0; i < count; ++i) {
            const int64_t chunk = rows[i] / y.chunk_rows;
            const int64_t first = starts[chunk] + rows[i] % y.chunk_rows * bytes;
            for (int64_t page = first / y.page; page <= (first + bytes - 1) / y.page; ++page)
                pages.emplace_back(files[chunk], page);
        }
        std::sort(pages.begin(), pages.end());
        pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
        const auto total = static_cast<int64_t>(pages.size());
        for (int64_t i = team.begin(total); i < team.end(total);) {
            int64_t j = i + 1;
            const auto follows = [&] {
                return pages[j].first == pages[i].first && pages[j].second == pages[j - 1].second + 1;
            };
            while (j < team.end(total) && follows()) ++j;
            posix_fadvise(pages[i].first, pages[i].second * y.page, (j - i) * y.page, POSIX_FADV_WILLNEED);
            i = j;
        }
    }
#endif
}

// summed [M, E Dv]: the picked rows of each token, weighted.
template <typename Real>
void sum_rows(const Team& team, const Memory<Real>& y, int64_t batch, const float* projected, const int64_t* rows,
              const int64_t* blocks, const float* scores, float* summed) {
    const int64_t picks = y.heads * y.topk, width = y.blocks * y.value_dim, slice = y.value_dim / y.num_cores;
    const int64_t begin = team.begin(batch) * picks, end = team.end(batch) * picks, ahead = 12;
    for (int64_t i = begin; i < std::min(end, begin + ahead); ++i) {
        if (y.pre_dim) prefetch_row(row_at(y, y.pre_values, y.pre_dim, rows[i]), y.pre_dim);
        prefetch_row(row_at(y, y.values, y.value_dim, rows[i]), y.value_dim);
    }
    for (int64_t i = begin; i < end; ++i) {
        const int64_t m = i / picks;
        if (i % picks == 0) std::fill_n(summed + m * width, width, 0.0f);
        if (i + ahead < end) {
            if (y.pre_dim) prefetch_row(row_at(y, y.pre_values, y.pre_dim, rows[i + ahead]), y.pre_dim);
            prefetch_row(row_at(y, y.values, y.value_dim, rows[i + ahead]), y.value_dim);
        }
        float rho = 1;
        if (y.pre_dim) {
            rho = dot(projected + m * y.pre_dim, row_at(y, y.pre_values, y.pre_dim, rows[i]), y.pre_dim);
            if (y.gelu) rho = rho * 0.5f * (1.0f + std::erf(rho * 0.70710678f));
        }
        const Real* row = row_at(y, y.values, y.value_dim, rows[i]);
        float* to = summed + m * width + (blocks ? blocks[i] : 0) * y.value_dim;
        for (int64_t c = 0; c < y.num_cores; ++c)
            add_scaled(to + c * slice, scores[i * y.num_cores + c] * rho, row + c * slice, slice);
    }
}

void add_rows(const Team& team, const float* from, int64_t count, float* to) {
    for (int64_t i = team.begin(count); i < team.end(count); ++i) to[i] += from[i];
}

// hidden [M, H] gets what FFN and memory layer (or null) add to it. 1 where a row is out of range, 0 otherwise.
template <typename Real>
int feedforward_step(const Feedforward<Real>& f, const Memory<Real>* memory, Real* given, int64_t batch,
                     int64_t threads) {
    using Kept = Working<Real>;
    const Memory<Real> none{}, &y = memory ? *memory : none;
    const int64_t inner = f.up.rows, picks = y.heads * y.topk, summed_size = y.blocks * y.value_dim;
    const int64_t query_size = y.query.rows, scored = 2 * y.rank * batch * y.heads * y.num_keys;
    const int64_t widest = std::max({f.hidden, inner, summed_size});
    Scratch& own = scratch();
    own.room(packed_size(widest) + scored + 64 * 16 + Kept::numbers(batch * f.hidden) +
             batch * (f.hidden + 2 * inner + query_size + y.pre.rows + y.gate.rows + 2 * y.dim * y.rank + summed_size +
                      picks * (y.num_cores + 4)));
    float *packed = own.take(packed_size(widest)), *x = own.take(batch * f.hidden), *up = own.take(batch * inner);
    float *gate = own.take(batch * inner), *query = own.take(batch * query_size), *pre = own.take(batch * y.pre.rows);
    float *value_gate = own.take(batch * y.gate.rows), *queries = own.take(batch * 2 * y.dim * y.rank);
    float *key_scores = own.take(scored), *summed = own.take(batch * summed_size);
    float* scores = own.take(batch * picks * y.num_cores);
    auto* rows = reinterpret_cast<int64_t*>(own.take(2 * batch * picks));
    auto* blocks = reinterpret_cast<int64_t*>(own.take(2 * batch * picks));
    const Kept hidden(given, batch * f.hidden, own);
    std::atomic<bool> good{true};
    with_team(threads, [&](const Team& team) {
        hidden.read(team);
        if (Kept::COPIED) team.wait();
        norm_rows(team, f.norm, hidden.get(), batch, f.hidden, x);
        team.wait();
        Segment<Real> inputs[5];
        int count = 0;
        const auto add = [&](const Linear<Real>& linear, float* out) {
            if (linear.weight) inputs[count++] = {linear.weight, linear.bias, linear.rows, out, linear.rows, false};
        };
        add(y.query, query);
        add(y.pre, pre);
        add(y.gate, value_gate);
        add(f.gate, gate);
        add(f.up, up);
        multiply(team, batch, f.hidden, x, packed, inputs, count);
        team.wait();
        const int64_t begin = team.begin(batch * inner), length = team.end(batch * inner) - begin;
        silu_times(gate + begin, up + begin, length);
        if (memory) {
            expand_queries(team, y, batch, query, queries);
            team.wait();
            score_keys(team, y, batch, queries, key_scores);
            team.wait();
            const int64_t places = batch * y.heads, rank_stride = places * y.num_keys;
            Search search;
            for (int64_t i = team.begin(places); i < team.end(places); ++i) {
                int64_t* own_rows = rows + i * y.topk;
                search.run(y, key_scores + i * y.num_keys, rank_stride, i % y.heads, own_rows,
                           scores + i * y.topk * y.num_cores);
                for (int64_t k = 0; k < y.topk; ++k)
                    if (!place_row(y, own_rows[k], own_rows[k], blocks[i * y.topk + k])) good = false;
            }
            if (y.fetch) {
                team.wait();
                fetch_rows(team, y, rows, batch * picks);
            }
        }
        team.wait();
        const Segment<Real> down = {f.down.weight, f.down.bias, f.hidden, hidden.get(), f.hidden, true};
        multiply(team, batch, inner, gate, packed, &down, 1);
        if (memory) {
            sum_rows(team, y, batch, y.pre.weight ? pre : x, rows, blocks, scores, summed);
            if (y.gate.weight) {
                for (int64_t m = team.begin(batch); m < team.end(batch); ++m) {
                    silu_times(value_gate + m * summed_size, summed + m * summed_size, summed_size);
                    std::copy_n(value_gate + m * summed_size, summed_size, summed + m * summed_size);
                }
            }
            team.wait();
            const Segment<Real> value = {y.value.weight, y.value.bias, f.hidden, hidden.get(), f.hidden, true};
            if (y.value.weight) multiply(team, batch, summed_size, summed, packed, &value, 1);
            else add_rows(team, summed, batch * summed_size, hidden.get());
        }
        if (Kept::COPIED) team.wait();
        hidden.write(team);
    });
    return !good;
}

}  // namespace

extern "C" {

// The picks of T tokens from the scores of all keys [2, R, T, h, N]: cells [T, h K] and their scores [T, h K, C].
int umv2_search(const Memory<float>* memory, const float* key_scores, int64_t* cells, float* scores, int64_t tokens,
                int64_t threads) {
    const Memory<float>& y = *memory;
    const int64_t places = tokens * y.heads;
    with_team(threads, [&](const Team& team) {
        Search search;
        for (int64_t i = team.begin(places); i < team.end(places); ++i)
            search.run(y, key_scores + i * y.num_keys, places * y.num_keys, i % y.heads, cells + i * y.topk,
                       scores + i * y.topk * y.num_cores);
    });
    return 0;
}

// The picked rows [T, P] of T tokens, weighted and added up: summed [T, E Dv]. blocks is null where there is one. 1
// where a row or block is out of range, 0 otherwise.
int umv2_sum_rows(const Memory<float>* memory, const float* projected, const int64_t* rows, const int64_t* blocks,
                  const float* scores, float* summed, int64_t tokens, int64_t threads) {
    std::atomic<bool> good{true};
    with_team(threads, [&](const Team& team) {
        if (inside(team, *memory, tokens, rows, blocks))
            sum_rows(team, *memory, tokens, projected, rows, blocks, scores, summed);
        else
            good = false;
    });
    return !good;
}

int umv2_feedforward(const Feedforward<float>* layer, const Memory<float>* memory, float* hidden, int64_t batch,
                     int64_t threads) {
    return feedforward_step(*layer, memory, hidden, batch, threads);
}
int umv2_feedforward_bfloat16(const Feedforward<Half>* layer, const Memory<Half>* memory, Half* hidden, int64_t batch,
                              int64_t threads) {
    return feedforward_step(*layer, memory, hidden, batch, threads);
}

}  // extern "C"
"""
