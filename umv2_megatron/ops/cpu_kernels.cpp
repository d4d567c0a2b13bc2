// The parts of the lookup for CPUs; cpu.py calls them, interface.py says what they compute.
//
// Who writes what: a token's sums belong to the thread that has the token, a row of a table's gradient to the thread
// that owns the row. So there are no atomics, and every sum is added up in the order of the picks: results are the
// same bit by bit from run to run and for any number of threads. Rows of a large table are cache misses, so each
// thread asks for the rows of coming picks ahead of time (AHEAD); the arithmetic hides behind the memory.
//
// Table: element type of a table, of the projected input, of the output and of its gradient. Acc: what is added up in
// and the type of scores and weights (float; double for double tables). Sum: element type of a table's gradient.
// Letters as in interface.py; n picks in all, pick i belongs to tokens[i], or to i / per_token where tokens is null.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_rows.h"
#include "cpu_threads.h"

namespace {

constexpr int64_t AHEAD = 32;       // picks between asking for a row and using it
constexpr int64_t AHEAD_OF_ADDING = 16;  // the same where rows are written to
constexpr int64_t TOGETHER = 4;     // rows whose products with one vector are computed together
constexpr int64_t LINE = 64;        // bytes of a cache line
constexpr int64_t PICKS_PER_THREAD = 128;  // fewer do not pay for waking a thread

using umv2::bfloat16;
using umv2::narrow;
using umv2::widen;

// Into the second level of cache: the rows of AHEAD picks would crowd the first. Rows that are written to are asked for
// in the same way, because a request to own a line holds one of the few buffers of the first level until it comes.
template <typename T>
inline void prefetch(const T* row, int64_t count) {
    const char* byte = reinterpret_cast<const char*>(row);
    const char* end = reinterpret_cast<const char*>(row + count);
    for (; byte < end; byte += LINE) __builtin_prefetch(byte, 0, 2);
}

struct Picks {
    const int64_t* rows;
    const int64_t* blocks;  // null: all 0
    const int64_t* tokens;  // null: pick i belongs to token i / per_token
    int64_t count, per_token;

    int64_t token(int64_t i) const { return tokens ? tokens[i] : i / per_token; }
    int64_t block(int64_t i) const { return blocks ? blocks[i] : 0; }
    // Where thread `part` of `parts` starts, moved on to the first pick of a token.
    int64_t start(int64_t part, int64_t parts) const {
        int64_t i = count * part / parts;
        if (i == 0 || i >= count) return i;
        if (!tokens) return std::min(count, (i + per_token - 1) / per_token * per_token);
        while (i < count && tokens[i] == tokens[i - 1]) ++i;
        return i;
    }
    // Where the picks of the token of pick i end, at most `end`.
    int64_t same_token(int64_t i, int64_t end) const {
        if (!tokens) return std::min(end, (i / per_token + 1) * per_token);
        const int64_t own = tokens[i];
        while (++i < end && tokens[i] == own) {
        }
        return i;
    }
    bool inside(int64_t num_rows, int64_t num_blocks) const {
        bool good = true;
        for (int64_t i = 0; i < count; ++i) {
            good &= static_cast<uint64_t>(rows[i]) < static_cast<uint64_t>(num_rows);
            if (blocks) good &= static_cast<uint64_t>(blocks[i]) < static_cast<uint64_t>(num_blocks);
        }
        return good;
    }
    // Owner of a row among `parts` threads: evenly spread by the upper bits of a product (Fibonacci hashing), because
    // popular rows may be neighbours.
    static int64_t owner(int64_t row, int64_t parts) {
        const uint64_t spread = (static_cast<uint64_t>(row) * 0x9E3779B97F4A7C15u) >> 32;
        return static_cast<int64_t>((spread * static_cast<uint64_t>(parts)) >> 32);
    }
    // The picks whose rows thread `part` owns, in order.
    std::vector<int64_t> owned(int64_t part, int64_t parts) const {
        std::vector<int64_t> mine;
        mine.reserve(static_cast<size_t>(count / parts + count / 8 + 8));
        for (int64_t i = 0; i < count; ++i)
            if (owner(rows[i], parts) == part) mine.push_back(i);
        return mine;
    }
};

// Run work(part, parts) on up to `threads` threads.
template <typename Work>
void in_parallel(int64_t threads, int64_t picks, const Work& work) {
    umv2::in_parallel(threads, picks, PICKS_PER_THREAD, work);
}

// A token's vector in Acc; converted once for all its picks.
template <typename Table, typename Acc>
class TokenVector {
  public:
    TokenVector(const Table* all, int64_t width) : all_(all), width_(width), wide_(static_cast<size_t>(width)) {}
    const Acc* at(int64_t token) {
        if (token != token_) {
            const Table* from = all_ + token * width_;
            for (int64_t j = 0; j < width_; ++j) wide_[static_cast<size_t>(j)] = static_cast<Acc>(widen(from[j]));
            token_ = token;
        }
        return wide_.data();
    }

  private:
    const Table* all_;
    int64_t width_, token_ = -1;
    std::vector<Acc> wide_;
};

// Asks for the rows of picks [first, stop) of a table; of none where it is null.
template <typename Table>
inline void prefetch_rows(const Picks& picks, int64_t first, int64_t stop, const Table* table, int64_t width) {
    for (int64_t i = first; i < stop && table; ++i) prefetch(table + picks.rows[i] * width, width);
}

// rho[first..stop), picks of one token, whose projected input is x. Asks for rows of `other`, too.
template <typename Table, typename Acc>
inline void token_dots(const Picks& picks, int64_t first, int64_t stop, int64_t end, const Acc* x, const Table* table,
                       int64_t width, Acc* rho, const Table* other = nullptr, int64_t other_width = 0) {
    int64_t i = first;
    for (; i + TOGETHER <= stop; i += TOGETHER) {
        const int64_t next = std::min(end, i + AHEAD), after = std::min(end, i + AHEAD + TOGETHER);
        prefetch_rows(picks, next, after, table, width);
        prefetch_rows(picks, next, after, other, other_width);
        umv2::dots<TOGETHER>([&](int64_t n) { return table + picks.rows[i + n] * width; }, x, width, rho + i);
    }
    for (; i < stop; ++i) {
        const int64_t next = std::min(end, i + AHEAD), after = std::min(end, next + 1);
        prefetch_rows(picks, next, after, table, width);
        prefetch_rows(picks, next, after, other, other_width);
        umv2::dots<1>([&](int64_t) { return table + picks.rows[i] * width; }, x, width, rho + i);
    }
}

// sum [E * width] += the weighted rows of picks [first, stop) of one token; weight(i, c) of pick i under core c.
template <typename Table, typename Acc, typename Weight>
inline void token_sum(const Picks& picks, int64_t first, int64_t stop, const Weight& weight, int64_t cores,
                      const Table* table, int64_t width, Acc* sum) {
    const int64_t slice = width / cores;
    for (int64_t c = 0; c < cores; ++c) {
        const int64_t left = c * slice;
        if (!picks.blocks) {
            umv2::add_rows(sum + left, slice, stop - first, [&](int64_t i) { return weight(first + i, c); },
                           [&](int64_t i) { return table + picks.rows[first + i] * width + left; });
            continue;
        }
        for (int64_t i = first; i < stop; ++i)
            umv2::add_rows(sum + picks.blocks[i] * width + left, slice, 1, [&](int64_t) { return weight(i, c); },
                           [&](int64_t) { return table + picks.rows[i] * width + left; });
    }
}

template <typename Table, typename Acc>
void pre_scores(const Picks& picks, const Table* projected, const Table* pre_values, int64_t width, Acc* rho,
                int64_t threads) {
    in_parallel(threads, picks.count, [&](int64_t part, int64_t parts) {
        TokenVector<Table, Acc> input(projected, width);
        const int64_t end = picks.start(part + 1, parts);
        for (int64_t i = picks.start(part, parts), stop; i < end; i = stop) {
            stop = picks.same_token(i, end);
            token_dots(picks, i, stop, end, input.at(picks.token(i)), pre_values, width, rho);
        }
    });
}

// out [T, E * Dv] holds zeros: tokens without picks are not written.
template <typename Table, typename Acc>
void weighted_sum(const Picks& picks, const Acc* weights, int64_t cores, const Table* values, int64_t width,
                  int64_t num_blocks, Table* out, int64_t threads) {
    const int64_t out_width = num_blocks * width;
    in_parallel(threads, picks.count, [&](int64_t part, int64_t parts) {
        std::vector<Acc> sum(static_cast<size_t>(out_width));
        const int64_t end = picks.start(part + 1, parts);
        for (int64_t i = picks.start(part, parts), stop; i < end; i = stop) {
            stop = picks.same_token(i, end);
            std::fill(sum.begin(), sum.end(), Acc(0));
            prefetch_rows(picks, std::min(end, i + AHEAD), std::min(end, stop + AHEAD), values, width);
            token_sum(picks, i, stop, [&](int64_t n, int64_t c) { return weights[n * cores + c]; }, cores, values, width,
                      sum.data());
            Table* to = out + picks.token(i) * out_width;
            for (int64_t j = 0; j < out_width; ++j) narrow(sum[static_cast<size_t>(j)], to[j]);
        }
    });
}

// Both of the above at once: while a token's pre-value rows are multiplied, the rows of the next are on their way from
// both tables. rho is kept for the backward. out holds zeros.
template <typename Table, typename Acc>
void one_pass(const Picks& picks, const Acc* scores, int64_t cores, const Table* projected, const Table* pre_values,
              int64_t pre_width, const Table* values, int64_t width, int64_t num_blocks, Acc* rho, Table* out,
              int64_t threads) {
    const int64_t out_width = num_blocks * width;
    in_parallel(threads, picks.count, [&](int64_t part, int64_t parts) {
        TokenVector<Table, Acc> input(projected, pre_width);
        std::vector<Acc> sum(static_cast<size_t>(out_width));
        const int64_t end = picks.start(part + 1, parts);
        for (int64_t i = picks.start(part, parts), stop; i < end; i = stop) {
            stop = picks.same_token(i, end);
            token_dots(picks, i, stop, end, input.at(picks.token(i)), pre_values, pre_width, rho, values, width);
            std::fill(sum.begin(), sum.end(), Acc(0));
            token_sum(picks, i, stop, [&](int64_t n, int64_t c) { return scores[n * cores + c] * rho[n]; }, cores,
                      values, width, sum.data());
            Table* to = out + picks.token(i) * out_width;
            for (int64_t j = 0; j < out_width; ++j) narrow(sum[static_cast<size_t>(j)], to[j]);
        }
    });
}

// value_sum may be null. One pass: the owner of a row has it in cache for both gradients.
template <typename Table, typename Acc, typename Sum>
void weighted_sum_backward(const Picks& picks, const Acc* weights, int64_t cores, const Table* grad_out,
                           const Table* values, int64_t width, int64_t num_blocks, Acc* weight_grad, Sum* value_sum,
                           int64_t threads) {
    const int64_t slice = width / cores;
    in_parallel(threads, picks.count, [&](int64_t part, int64_t parts) {
        TokenVector<Table, Acc> upstream(grad_out, num_blocks * width);
        const std::vector<int64_t> mine = picks.owned(part, parts);
        for (size_t k = 0; k < mine.size(); ++k) {
            if (k + AHEAD_OF_ADDING < mine.size()) {
                const int64_t next = picks.rows[mine[k + AHEAD_OF_ADDING]] * width;
                prefetch(values + next, width);
                if (value_sum) prefetch(value_sum + next, width);
            }
            const int64_t i = mine[k], place = picks.rows[i] * width;
            const Acc* grad = upstream.at(picks.token(i)) + picks.block(i) * width;
            for (int64_t c = 0; c < cores; ++c) {
                const int64_t left = c * slice;
                const Table* row = values + place + left;
                Acc& found = weight_grad[i * cores + c];
                if (value_sum)
                    found = umv2::dot_and_add(row, value_sum + place + left, weights[i * cores + c], grad + left, slice);
                else
                    umv2::dots<1>([&](int64_t) { return row; }, grad + left, slice, &found);
            }
        }
    });
}

// projected_grad [T, Dp] holds zeros; pre_value_sum may be null.
template <typename Table, typename Acc, typename Sum>
void pre_scores_backward(const Picks& picks, const Acc* rho_grad, const Table* projected, const Table* pre_values,
                         int64_t width, Table* projected_grad, Sum* pre_value_sum, int64_t threads) {
    in_parallel(threads, picks.count, [&](int64_t part, int64_t parts) {
        std::vector<Acc> sum(static_cast<size_t>(width));
        const int64_t end = picks.start(part + 1, parts);
        Picks all = picks;
        all.blocks = nullptr;
        for (int64_t i = picks.start(part, parts), stop; i < end; i = stop) {
            stop = picks.same_token(i, end);
            std::fill(sum.begin(), sum.end(), Acc(0));
            prefetch_rows(picks, std::min(end, i + AHEAD), std::min(end, stop + AHEAD), pre_values, width);
            token_sum(all, i, stop, [&](int64_t n, int64_t) { return rho_grad[n]; }, 1, pre_values, width, sum.data());
            Table* to = projected_grad + picks.token(i) * width;
            for (int64_t j = 0; j < width; ++j) narrow(sum[static_cast<size_t>(j)], to[j]);
        }
        if (!pre_value_sum) return;
        TokenVector<Table, Acc> input(projected, width);
        const std::vector<int64_t> mine = picks.owned(part, parts);
        for (size_t k = 0; k < mine.size(); ++k) {
            if (k + AHEAD_OF_ADDING < mine.size())
                prefetch(pre_value_sum + picks.rows[mine[k + AHEAD_OF_ADDING]] * width, width);
            const int64_t i = mine[k];
            umv2::add_to_row(pre_value_sum + picks.rows[i] * width, rho_grad[i], input.at(picks.token(i)), width);
        }
    });
}

enum Dtype { FLOAT32, BFLOAT16, FLOAT64 };  // as in cpu.py

}  // namespace

// Every function returns 0, or 1 without having written anything when a row or block is out of range.
extern "C" {

struct Call {  // as in cpu.py
    const int64_t *rows, *blocks, *tokens;
    int64_t picks, per_token, num_rows, num_blocks, width, pre_width, cores, threads;
    int64_t table_dtype, sum_dtype;
};

#define PICKS(call)                                                                             \
    const Picks picks{call->rows, call->blocks, call->tokens, call->picks, call->per_token};    \
    if (!picks.inside(call->num_rows, call->num_blocks)) return 1

int umv2_pre_scores(const Call* call, const void* projected, const void* pre_values, void* rho) {
    PICKS(call);
    auto run = [&](auto table, auto acc) {
        using T = decltype(table);
        using A = decltype(acc);
        pre_scores(picks, static_cast<const T*>(projected), static_cast<const T*>(pre_values), call->width,
                   static_cast<A*>(rho), call->threads);
        return 0;
    };
    if (call->table_dtype == FLOAT32) return run(float(), float());
    if (call->table_dtype == BFLOAT16) return run(bfloat16(), float());
    return run(double(), double());
}

int umv2_weighted_sum(const Call* call, const void* weights, const void* values, void* out) {
    PICKS(call);
    auto run = [&](auto table, auto acc) {
        using T = decltype(table);
        using A = decltype(acc);
        weighted_sum(picks, static_cast<const A*>(weights), call->cores, static_cast<const T*>(values), call->width,
                     call->num_blocks, static_cast<T*>(out), call->threads);
        return 0;
    };
    if (call->table_dtype == FLOAT32) return run(float(), float());
    if (call->table_dtype == BFLOAT16) return run(bfloat16(), float());
    return run(double(), double());
}

int umv2_one_pass(const Call* call, const void* scores, const void* projected, const void* pre_values,
                  const void* values, void* rho, void* out) {
    PICKS(call);
    auto run = [&](auto table, auto acc) {
        using T = decltype(table);
        using A = decltype(acc);
        one_pass(picks, static_cast<const A*>(scores), call->cores, static_cast<const T*>(projected),
                 static_cast<const T*>(pre_values), call->pre_width, static_cast<const T*>(values), call->width,
                 call->num_blocks, static_cast<A*>(rho), static_cast<T*>(out), call->threads);
        return 0;
    };
    if (call->table_dtype == FLOAT32) return run(float(), float());
    if (call->table_dtype == BFLOAT16) return run(bfloat16(), float());
    return run(double(), double());
}

int umv2_weighted_sum_backward(const Call* call, const void* weights, const void* grad_out, const void* values,
                               void* weight_grad, void* value_sum) {
    PICKS(call);
    auto run = [&](auto table, auto acc, auto sum) {
        using T = decltype(table);
        using A = decltype(acc);
        using S = decltype(sum);
        weighted_sum_backward(picks, static_cast<const A*>(weights), call->cores, static_cast<const T*>(grad_out),
                              static_cast<const T*>(values), call->width, call->num_blocks,
                              static_cast<A*>(weight_grad), static_cast<S*>(value_sum), call->threads);
        return 0;
    };
    if (call->table_dtype == FLOAT32) return run(float(), float(), float());
    if (call->table_dtype == FLOAT64) return run(double(), double(), double());
    return call->sum_dtype == FLOAT32 ? run(bfloat16(), float(), float()) : run(bfloat16(), float(), bfloat16());
}

int umv2_pre_scores_backward(const Call* call, const void* rho_grad, const void* projected, const void* pre_values,
                             void* projected_grad, void* pre_value_sum) {
    PICKS(call);
    auto run = [&](auto table, auto acc, auto sum) {
        using T = decltype(table);
        using A = decltype(acc);
        using S = decltype(sum);
        pre_scores_backward(picks, static_cast<const A*>(rho_grad), static_cast<const T*>(projected),
                            static_cast<const T*>(pre_values), call->width, static_cast<T*>(projected_grad),
                            static_cast<S*>(pre_value_sum), call->threads);
        return 0;
    };
    if (call->table_dtype == FLOAT32) return run(float(), float(), float());
    if (call->table_dtype == FLOAT64) return run(double(), double(), double());
    return call->sum_dtype == FLOAT32 ? run(bfloat16(), float(), float()) : run(bfloat16(), float(), bfloat16());
}

}  // extern "C"
