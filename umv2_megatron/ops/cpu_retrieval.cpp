// Retrieval for CPUs in one piece: scores of keys, the two-stage search, and the scores of the picks, a tile of tokens at
// a time; cpu_retrieval.py calls it and has the equations.
//
// Forward: a tile's scores are products of its queries with keys that lie in panels, and stay in cache until the search
// of these tokens has read them. The norms of the queries are factors of the scores. Backward: a token has a gradient
// for the few keys that its picks use, so the two products run over lists of (token, key), a fifth of the time of dense
// ones; nothing of the size of the scores exists. A token's gradient belongs to the thread that has the token, a key's
// to the thread that owns the key, so results do not depend on the number of threads.
//
// Letters: T tokens, h heads, N keys per side, R rank, R' queries per side (R, or 1 that serves every rank), Dk key dim,
// C cores, K' keys kept per side, K cells kept. Side 0 is the row. A plane is one of the 2 R pairs (side, rank).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_product.h"
#include "selection.h"
#include "cpu_threads.h"

namespace {

constexpr int64_t TOKENS_PER_THREAD = 16;  // fewer do not pay for waking a thread
constexpr int64_t KEYS_PER_THREAD = 32;
constexpr int64_t TILE = 48;       // tokens whose scores are in cache together
constexpr int64_t BLOCK = 64;      // tokens, or keys, whose sums for cores, or gains, are added up before they meet others
constexpr int64_t PASS = 128;      // tokens whose queries are in cache while gradients of keys are added up

using umv2::LANES;
using umv2::PANEL;
using umv2::Vector;

struct Sizes {  // as in cpu_retrieval.py
    int64_t rank, queries, tokens, heads, keys, dim, kept, topk, cores, threads;
    double epsilon;

    int64_t planes() const { return 2 * rank; }
    int64_t all_keys() const { return heads * keys; }
    int64_t panels() const { return (all_keys() + PANEL - 1) / PANEL; }
    int64_t width() const { return panels() * PANEL; }
    int64_t query(int64_t plane) const { return plane / rank * queries + (queries > 1 ? plane % rank : 0); }
    int64_t per_token() const { return 2 * queries * dim; }
};

inline float sum_of_squares(const float* x, int64_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += x[i] * x[i];
    return sum;
}

inline float inverse_norm(const Sizes& z, const float* x) {
    return 1.0f / std::sqrt(sum_of_squares(x, z.dim) / static_cast<float>(z.dim) + static_cast<float>(z.epsilon));
}

// Ranks of one key [Dk, R] apart: `apart` [R, Dk].
inline void split_ranks(const Sizes& z, const float* key, float* apart) {
    for (int64_t r = 0; r < z.rank; ++r)
        for (int64_t d = 0; d < z.dim; ++d) apart[r * z.dim + d] = key[d * z.rank + r];
}

inline const float* key_of(const Sizes& z, const float* keys, int64_t side, int64_t key) {
    return keys + (((key / z.keys) * 2 + side) * z.keys + key % z.keys) * z.dim * z.rank;
}

// Normalised keys times `gain` (that of the keys times that of the queries): in panels [planes, panels, Dk, PANEL], with
// zeros behind the last, or in rows [planes, h N, Dk].
void normalised_keys(const Sizes& z, const float* keys, const float* gain, float* vectors, bool in_panels) {
    umv2::in_parallel(z.threads, 2 * z.panels(), KEYS_PER_THREAD / PANEL + 1, [&](int64_t part, int64_t parts) {
        std::vector<float> apart(static_cast<size_t>(z.rank * z.dim));
        for (int64_t i = 2 * z.panels() * part / parts; i < 2 * z.panels() * (part + 1) / parts; ++i) {
            const int64_t side = i / z.panels(), panel = i % z.panels();
            for (int64_t lane = 0; lane < PANEL; ++lane) {
                const int64_t key = panel * PANEL + lane;
                if (key >= z.all_keys() && !in_panels) break;
                if (key < z.all_keys()) split_ranks(z, key_of(z, keys, side, key), apart.data());
                else std::fill(apart.begin(), apart.end(), 0.0f);
                for (int64_t r = 0; r < z.rank; ++r) {
                    const int64_t plane = side * z.rank + r;
                    const float* from = apart.data() + r * z.dim;
                    const float factor = inverse_norm(z, from);
                    if (in_panels) {
                        float* to = vectors + (plane * z.panels() + panel) * z.dim * PANEL + lane;
                        for (int64_t d = 0; d < z.dim; ++d) to[d * PANEL] = from[d] * factor * gain[d];
                    } else {
                        float* to = vectors + (plane * z.all_keys() + key) * z.dim;
                        for (int64_t d = 0; d < z.dim; ++d) to[d] = from[d] * factor * gain[d];
                    }
                }
            }
        }
    });
}

// Scores [planes, tokens, width] of `tokens` tokens whose queries begin at `query`, before the queries' norms.
void score_tile(const Sizes& z, const float* query, int64_t tokens, const float* panels, float* scores) {
    for (int64_t plane = 0; plane < z.planes(); ++plane)
        umv2::panel_product({query + z.query(plane) * z.dim, z.per_token(), 1}, tokens,
                            panels + plane * z.panels() * z.dim * PANEL, z.panels(), z.dim,
                            scores + plane * TILE * z.width(), z.width());
}

// to[0..count) = sum over i < terms of factors[i] * from[i * stride + 0..count); TERMS is their number or 0 for any.
template <int64_t TERMS>
inline void weighted(int64_t terms, const float* factors, const float* from, int64_t stride, int64_t count, float* to) {
    if (TERMS) terms = TERMS;
    Vector sum, numbers, factor;
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) {
        umv2::load(numbers, from + j);
        umv2::spread(factor, factors[0]);
        sum = factor * numbers;
        for (int64_t i = 1; i < terms; ++i) {
            umv2::load(numbers, from + i * stride + j);
            umv2::spread(factor, factors[i]);
            sum += factor * numbers;
        }
        umv2::store(to + j, sum);
    }
    for (; j < count; ++j) {
        to[j] = factors[0] * from[j];
        for (int64_t i = 1; i < terms; ++i) to[j] += factors[i] * from[i * stride + j];
    }
}

inline void weighted(int64_t terms, const float* factors, const float* from, int64_t stride, int64_t count, float* to) {
    if (terms == 2) weighted<2>(terms, factors, from, stride, count, to);
    else weighted<0>(terms, factors, from, stride, count, to);
}

// Everything after the products, for one token and head.
class TokenSearch {
  public:
    TokenSearch(const Sizes& sizes, const float* vectors, const float* total, const float* cores)
        : z(sizes), vectors_(vectors), total_(total), cores_(cores), factors_(at(z.rank)), sum_(at(z.keys)), grid_(at(z.kept * z.kept)),
          side_scores_(at(2 * z.rank * z.kept)), cell_(at(z.topk)), kept_(at(2 * z.kept)) {}

    // `scores` of the planes of the token are `plane_stride` apart, `norms` [planes] their factors. Writes the K picks'
    // `grid`, row * N + column; `places` and `picked`, their keys and the keys' scores, planes and sides apart by the
    // strides; and their scores [K, C].
    void run(int64_t head, const float* scores, int64_t plane_stride, const float* norms, int64_t* grid,
             int32_t* places, int64_t side_stride, float* picked, int64_t picked_stride, float* out) {
        for (int64_t side = 0; side < 2; ++side) keep(side, head, scores, plane_stride, norms);
        const int32_t* cells = best_cells(head);
        const uint32_t width = static_cast<uint32_t>(z.kept);  // in 32 bits, whose division is faster
        for (int64_t k = 0; k < z.topk; ++k) {
            const int64_t i = static_cast<uint32_t>(cells[k]) / width, j = cells[k] - i * z.kept;
            const int32_t row = kept_[static_cast<size_t>(i)], column = kept_[static_cast<size_t>(z.kept + j)];
            places[k] = row;
            places[side_stride + k] = column;
            grid[k] = row * z.keys + column;
            for (int64_t r = 0; r < z.rank; ++r) {
                picked[r * picked_stride + k] = side_scores_[static_cast<size_t>(r * z.kept + i)];
                picked[(z.rank + r) * picked_stride + k] = side_scores_[static_cast<size_t>((z.rank + r) * z.kept + j)];
            }
        }
        for (int64_t c = 0; c < z.cores; ++c) {
            std::fill(cell_.begin(), cell_.end(), 0.0f);
            const float* core = cores_ + (c * z.heads + head) * z.rank * z.rank;
            for (int64_t r = 0; r < z.rank; ++r)
                for (int64_t s = 0; s < z.rank; ++s) {
                    const float *left = picked + r * picked_stride, *right = picked + (z.rank + s) * picked_stride;
                    const float factor = core[r * z.rank + s];
#pragma omp simd
                    for (int64_t k = 0; k < z.topk; ++k) cell_[static_cast<size_t>(k)] += factor * left[k] * right[k];
                }
            for (int64_t k = 0; k < z.topk; ++k) out[k * z.cores + c] = cell_[static_cast<size_t>(k)];
        }
    }

  private:
    static size_t at(int64_t count) { return static_cast<size_t>(count); }

    // The best keys of a side, to kept_, and their scores, to side_scores_ [2, R, K'].
    void keep(int64_t side, int64_t head, const float* scores, int64_t plane_stride, const float* norms) {
        for (int64_t r = 0; r < z.rank; ++r)
            factors_[at(r)] = vectors_[(side * z.heads + head) * z.rank + r] * norms[side * z.rank + r];
        weighted(z.rank, factors_.data(), scores + side * z.rank * plane_stride + head * z.keys, plane_stride, z.keys,
                 sum_.data());
        const int32_t* best = selection_.best(sum_.data(), z.keys, z.kept);
        std::copy_n(best, z.kept, kept_.begin() + side * z.kept);
        for (int64_t r = 0; r < z.rank; ++r) {
            const int64_t plane = side * z.rank + r;
            const float* from = scores + plane * plane_stride + head * z.keys;
            for (int64_t i = 0; i < z.kept; ++i) side_scores_[at(plane * z.kept + i)] = norms[plane] * from[best[i]];
        }
    }

    const int32_t* best_cells(int64_t head) {
        const float *core = total_ + head * z.rank * z.rank, *left = side_scores_.data();
        const float* right = left + z.rank * z.kept;
        for (int64_t i = 0; i < z.kept; ++i) {
            for (int64_t s = 0; s < z.rank; ++s) {
                float factor = 0;
                for (int64_t r = 0; r < z.rank; ++r) factor += core[r * z.rank + s] * left[r * z.kept + i];
                factors_[at(s)] = factor;
            }
            weighted(z.rank, factors_.data(), right, z.kept, z.kept, grid_.data() + i * z.kept);
        }
        return selection_.best(grid_.data(), z.kept * z.kept, z.topk);
    }

    const Sizes& z;
    const float *vectors_, *total_, *cores_;
    umv2::Selection<float> selection_;
    std::vector<float> factors_, sum_, grid_, side_scores_, cell_;
    std::vector<int32_t> kept_;
};

// query [T, 2, R', Dk]; vectors [2, h, R], u and t; total [h, R, R] and cores [C, h, R, R]; grid [T, h, K], places
// [2, T, h, K], picked [2, R, T, h, K], scores [T, h, K, C].
void retrieve(const Sizes& z, const float* query, const float* panels, const float* vectors, const float* total,
              const float* cores, int64_t* grid, int32_t* places, float* picked, float* scores) {
    umv2::in_parallel(z.threads, z.tokens, TOKENS_PER_THREAD, [&](int64_t part, int64_t parts) {
        TokenSearch search(z, vectors, total, cores);
        std::vector<float> tile(static_cast<size_t>(z.planes() * TILE * z.width())), norms(static_cast<size_t>(z.planes()));
        const int64_t stop = z.tokens * (part + 1) / parts, stride = z.tokens * z.heads * z.topk;
        for (int64_t first = z.tokens * part / parts; first < stop; first += TILE) {
            const int64_t count = std::min(TILE, stop - first);
            score_tile(z, query + first * z.per_token(), count, panels, tile.data());
            for (int64_t t = 0; t < count; ++t) {
                const float* own = query + (first + t) * z.per_token();
                for (int64_t plane = 0; plane < z.planes(); ++plane)
                    norms[static_cast<size_t>(plane)] = inverse_norm(z, own + z.query(plane) * z.dim);
                for (int64_t head = 0; head < z.heads; ++head) {
                    const int64_t pick = ((first + t) * z.heads + head) * z.topk;
                    search.run(head, tile.data() + t * z.width(), TILE * z.width(), norms.data(), grid + pick,
                               places + pick, stride, picked + pick, stride, scores + pick * z.cores);
                }
            }
        }
    });
}

// to[0..width) += sum over i of weights[i] * row(i)[0..width), in the order of i.
template <int64_t V, typename Row>
inline void add_columns(float* to, int64_t count, const float* weights, const Row& row, int64_t column) {
    Vector sum[V], numbers, weight;
    for (int64_t v = 0; v < V; ++v) umv2::load(sum[v], to + column + v * LANES);
    for (int64_t i = 0; i < count; ++i) {
        const float* from = row(i) + column;
        umv2::spread(weight, weights[i]);
        for (int64_t v = 0; v < V; ++v) {
            umv2::load(numbers, from + v * LANES);
            sum[v] += weight * numbers;
        }
    }
    for (int64_t v = 0; v < V; ++v) umv2::store(to + column + v * LANES, sum[v]);
}

template <typename Row>
inline void add_rows(float* to, int64_t width, int64_t count, const float* weights, const Row& row) {
    int64_t column = 0;
    for (; column + 6 * LANES <= width; column += 6 * LANES) add_columns<6>(to, count, weights, row, column);
    for (; column + LANES <= width; column += LANES) add_columns<1>(to, count, weights, row, column);
    for (int64_t i = 0; i < count && column < width; ++i)
        for (int64_t j = column; j < width; ++j) to[j] += weights[i] * row(i)[j];
}

struct KeyLists {  // of every side, token and head: the distinct keys of its picks, and the scores' gradients
    int32_t *keys, *counts;  // [2, T, h, K], [2, T, h]
    float* grads;            // [2, R, T, h, K], times the factor of the query's norm
};

// The part of the backward that belongs to tokens. grad [T, h, K, C]; key_rows [planes, h N, Dk]; query_grad like query;
// core_grads [blocks, C, h, R, R] holds zeros and gets the sums of every BLOCK tokens.
void token_grads(const Sizes& z, const float* grad, const float* query, const float* key_rows, const int32_t* places,
                 const float* picked, const float* cores, float* query_grad, float* core_grads, const KeyLists& lists) {
    const int64_t blocks = (z.tokens + BLOCK - 1) / BLOCK, square = z.rank * z.rank, all_picks = z.tokens * z.heads * z.topk;
    umv2::in_parallel(z.threads, blocks, 1, [&](int64_t part, int64_t parts) {
        const size_t topk = static_cast<size_t>(z.topk);
        std::vector<int32_t> slots(static_cast<size_t>(z.keys), -1), own_slots(topk);
        std::vector<float> upstream(topk), of_picks(static_cast<size_t>(z.planes()) * topk);
        std::vector<float> factors(static_cast<size_t>(2 * z.queries));  // of the token's queries
        for (int64_t token = blocks * part / parts * BLOCK;
             token < std::min(z.tokens, blocks * (part + 1) / parts * BLOCK); ++token) {
            const float* own = query + token * z.per_token();
            float* own_grad = query_grad + token * z.per_token();
            std::fill_n(own_grad, z.per_token(), 0.0f);
            for (int64_t i = 0; i < 2 * z.queries; ++i) factors[static_cast<size_t>(i)] = inverse_norm(z, own + i * z.dim);
            for (int64_t head = 0; head < z.heads; ++head) {
                const int64_t place = token * z.heads + head, pick = place * z.topk;
                std::fill(of_picks.begin(), of_picks.end(), 0.0f);
                for (int64_t c = 0; c < z.cores; ++c) {
                    const int64_t matrix = (c * z.heads + head) * square;
                    float* core_grad = core_grads + token / BLOCK * z.cores * z.heads * square + matrix;
                    for (int64_t k = 0; k < z.topk; ++k) upstream[static_cast<size_t>(k)] = grad[(pick + k) * z.cores + c];
                    const float* up = upstream.data();
                    for (int64_t r = 0; r < z.rank; ++r)
                        for (int64_t s = 0; s < z.rank; ++s) {
                            const float core = cores[matrix + r * z.rank + s];
                            const float *left = picked + r * all_picks + pick, *right = picked + (z.rank + s) * all_picks + pick;
                            float *to_left = of_picks.data() + r * z.topk, *to_right = of_picks.data() + (z.rank + s) * z.topk;
                            float sum = 0;
#pragma omp simd reduction(+ : sum)
                            for (int64_t k = 0; k < z.topk; ++k) {
                                to_left[k] += up[k] * core * right[k];
                                to_right[k] += up[k] * core * left[k];
                                sum += up[k] * left[k] * right[k];
                            }
                            core_grad[r * z.rank + s] += sum;
                        }
                }
                for (int64_t side = 0; side < 2; ++side) {
                    const int32_t* chosen = places + side * all_picks + pick;
                    int32_t *listed = lists.keys + side * all_picks + pick, count = 0;
                    for (int64_t k = 0; k < z.topk; ++k) {
                        int32_t& slot = slots[static_cast<size_t>(chosen[k])];
                        const bool first_time = slot < 0;  // without a branch: nobody can foretell it
                        slot = first_time ? count : slot;
                        listed[count] = chosen[k];
                        count += first_time;
                        own_slots[static_cast<size_t>(k)] = slot;
                    }
                    lists.counts[side * z.tokens * z.heads + place] = count;
                    for (int64_t r = 0; r < z.rank; ++r) {
                        const int64_t plane = side * z.rank + r;
                        const float* from = of_picks.data() + plane * z.topk;
                        const float factor = factors[static_cast<size_t>(z.query(plane))];
                        float* to = lists.grads + plane * all_picks + pick;
                        std::fill_n(to, count, 0.0f);
                        for (int64_t k = 0; k < z.topk; ++k) to[own_slots[static_cast<size_t>(k)]] += from[k];
                        for (int32_t i = 0; i < count; ++i) to[i] *= factor;
                        const float* rows = key_rows + (plane * z.all_keys() + head * z.keys) * z.dim;
                        add_rows(own_grad + z.query(plane) * z.dim, z.dim, count, to,
                                 [&](int64_t i) { return rows + listed[i] * z.dim; });
                    }
                    for (int32_t i = 0; i < count; ++i) slots[static_cast<size_t>(listed[i])] = -1;
                }
            }
            // Through x / sqrt(mean(x^2) + epsilon): what lies along x is taken out.
            for (int64_t i = 0; i < 2 * z.queries; ++i) {
                const float *x = own + i * z.dim, factor = factors[static_cast<size_t>(i)];
                float* to = own_grad + i * z.dim;
                float along = 0;
#pragma omp simd reduction(+ : along)
                for (int64_t d = 0; d < z.dim; ++d) along += x[d] * to[d];
                along *= factor * factor / static_cast<float>(z.dim);
#pragma omp simd
                for (int64_t d = 0; d < z.dim; ++d) to[d] -= along * x[d];
            }
        }
    });
}

// The part that belongs to keys: key_row_grads [planes, h N, Dk] holds zeros. PASS tokens at a time, whose queries stay
// in cache; their entries are sorted by key, by counting.
void key_row_grads(const Sizes& z, const float* query, const KeyLists& lists, float* key_row_grads) {
    const int64_t all_picks = z.tokens * z.heads * z.topk, all_keys = z.all_keys();
    umv2::in_parallel(z.threads, all_keys, KEYS_PER_THREAD, [&](int64_t part, int64_t parts) {
        std::vector<int32_t> ends(static_cast<size_t>(all_keys + 1)), tokens, places;
        std::vector<float> weights;
        for (int64_t first = 0; first < z.tokens; first += PASS)
            for (int64_t side = 0; side < 2; ++side) {
                const int64_t begin = first * z.heads, stop = std::min(z.tokens, first + PASS) * z.heads;
                const int32_t* counts = lists.counts + side * z.tokens * z.heads;
                const auto each_of_mine = [&](const auto& work) {
                    for (int64_t place = begin; place < stop; ++place) {
                        const int32_t* listed = lists.keys + side * all_picks + place * z.topk;
                        const int64_t head = place % z.heads * z.keys;
                        for (int32_t i = 0; i < counts[place]; ++i)
                            if ((head + listed[i]) % parts == part) work(head + listed[i], place, place * z.topk + i);
                    }
                };
                std::fill(ends.begin(), ends.end(), 0);
                each_of_mine([&](int64_t key, int64_t, int64_t) { ++ends[static_cast<size_t>(key + 1)]; });
                for (size_t key = 0; key < static_cast<size_t>(all_keys); ++key) ends[key + 1] += ends[key];
                const size_t count = static_cast<size_t>(ends.back());
                tokens.resize(count);
                places.resize(count);
                weights.resize(count);
                each_of_mine([&](int64_t key, int64_t place, int64_t entry) {
                    const size_t to = static_cast<size_t>(ends[static_cast<size_t>(key)]++);
                    tokens[to] = static_cast<int32_t>(place / z.heads);
                    places[to] = static_cast<int32_t>(entry - begin * z.topk);
                });  // now ends[key] is where the entries of the next key begin
                for (int64_t r = 0; r < z.rank; ++r) {
                    const int64_t plane = side * z.rank + r;
                    const float* grads = lists.grads + plane * all_picks + begin * z.topk;
                    for (size_t i = 0; i < count; ++i) weights[i] = grads[places[i]];
                    const float* queries = query + z.query(plane) * z.dim;
                    int32_t from = 0;
                    for (int64_t key = 0; key < all_keys; ++key) {
                        const int32_t to = ends[static_cast<size_t>(key)];
                        if (to == from) continue;
                        const int32_t* who = tokens.data() + from;
                        add_rows(key_row_grads + (plane * all_keys + key) * z.dim, z.dim, to - from, weights.data() + from,
                                 [&](int64_t i) { return queries + who[i] * z.per_token(); });
                        from = to;
                    }
                }
            }
    });
}

// From the gradient of ``normalised_keys`` in rows to key_grads, like keys, and to gain_grads [blocks of keys, Dk], which
// holds zeros.
void keys_backward(const Sizes& z, const float* keys, const float* gain, const float* row_grads, float* key_grads,
                   float* gain_grads) {
    const int64_t blocks = (z.all_keys() + BLOCK - 1) / BLOCK;
    umv2::in_parallel(z.threads, blocks, 1, [&](int64_t part, int64_t parts) {
        std::vector<float> apart(static_cast<size_t>(z.rank * z.dim));
        for (int64_t key = blocks * part / parts * BLOCK; key < std::min(z.all_keys(), blocks * (part + 1) / parts * BLOCK);
             ++key)
            for (int64_t side = 0; side < 2; ++side) {
                const float* from = key_of(z, keys, side, key);
                float* to = key_grads + (from - keys);
                float* of_gain = gain_grads + key / BLOCK * z.dim;
                split_ranks(z, from, apart.data());
                for (int64_t r = 0; r < z.rank; ++r) {
                    const float *x = apart.data() + r * z.dim, factor = inverse_norm(z, x);
                    const float* grad = row_grads + ((side * z.rank + r) * z.all_keys() + key) * z.dim;
                    float along = 0;
#pragma omp simd reduction(+ : along)
                    for (int64_t d = 0; d < z.dim; ++d) {
                        of_gain[d] += grad[d] * x[d] * factor;
                        along += grad[d] * gain[d] * x[d];
                    }
                    along *= factor * factor / static_cast<float>(z.dim);
                    for (int64_t d = 0; d < z.dim; ++d) to[d * z.rank + r] = factor * (grad[d] * gain[d] - along * x[d]);
                }
            }
    });
}

}  // namespace

extern "C" {

int64_t umv2_retrieval_block() { return BLOCK; }

// Floats of the keys in panels.
int64_t umv2_retrieval_panels(const Sizes* sizes) { return sizes->planes() * sizes->width() * sizes->dim; }

void umv2_retrieve(const Sizes* sizes, const float* query, const float* keys, const float* gain, const float* vectors,
                   const float* total, const float* cores, float* panels, int64_t* grid, int32_t* places, float* picked,
                   float* scores) {
    normalised_keys(*sizes, keys, gain, panels, true);
    retrieve(*sizes, query, panels, vectors, total, cores, grid, places, picked, scores);
}

// key_rows and row_grads [planes, h N, Dk] are scratch, row_grads with zeros; so are gain_parts and core_parts, the sums of
// every BLOCK keys and tokens, whose sums gain_grad and core_grads hold zeros.
void umv2_retrieve_backward(const Sizes* sizes, const float* grad, const float* query, const float* keys,
                            const float* gain, const float* cores, const int32_t* places, const float* picked,
                            float* key_rows, float* row_grads, int32_t* listed, int32_t* counts, float* listed_grads,
                            float* query_grad, float* key_grads, float* gain_parts, float* gain_grad, float* core_parts,
                            float* core_grads) {
    const KeyLists lists{listed, counts, listed_grads};
    normalised_keys(*sizes, keys, gain, key_rows, false);
    token_grads(*sizes, grad, query, key_rows, places, picked, cores, query_grad, core_parts, lists);
    key_row_grads(*sizes, query, lists, row_grads);
    keys_backward(*sizes, keys, gain, row_grads, key_grads, gain_parts);
    umv2::add_up(gain_parts, (sizes->all_keys() + BLOCK - 1) / BLOCK, sizes->dim, gain_grad);
    umv2::add_up(core_parts, (sizes->tokens + BLOCK - 1) / BLOCK, sizes->cores * sizes->heads * sizes->rank * sizes->rank,
                 core_grads);
}

}  // extern "C"
