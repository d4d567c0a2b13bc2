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

#include "cpu_threads.h"

namespace {

constexpr int64_t AHEAD = 16;       // picks between asking for a row and using it
constexpr int64_t AHEAD_IN_BOTH = 8;  // the same where a pick has rows in two tables
constexpr int64_t LINE = 64;        // bytes of a cache line
constexpr int64_t PICKS_PER_THREAD = 128;  // fewer do not pay for waking a thread

struct bfloat16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, bfloat16& out) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

template <typename Table, typename Acc>
inline Acc dot(const Table* row, const Acc* x, int64_t count) {
    Acc sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) sum += static_cast<Acc>(widen(row[j])) * x[j];
    return sum;
}

// to += weight * from
template <typename From, typename Acc>
inline void add_to_scratch(Acc* to, Acc weight, const From* from, int64_t count) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) to[j] += weight * static_cast<Acc>(widen(from[j]));
}

template <typename Sum, typename Acc>
inline void add_to_row(Sum* to, Acc weight, const Acc* from, int64_t count) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) narrow(static_cast<Acc>(widen(to[j])) + weight * from[j], to[j]);
}

// Into the second level of cache: the rows of AHEAD picks would crowd the first.
template <typename T>
inline void prefetch(const T* row, int64_t count, bool write) {
    const char* byte = reinterpret_cast<const char*>(row);
    const char* end = reinterpret_cast<const char*>(row + count);
    for (; byte < end; byte += LINE) {
        if (write) __builtin_prefetch(byte, 1, 1);
        else __builtin_prefetch(byte, 0, 1);
    }
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

template <typename Table, typename Acc>
void pre_scores(const Picks& picks, const Table* projected, const Table* pre_values, int64_t width, Acc* rho,
                int64_t threads) {
    in_parallel(threads, picks.count, [&](int64_t part, int64_t parts) {
        TokenVector<Table, Acc> input(projected, width);
        const int64_t stop = picks.start(part + 1, parts);
        for (int64_t i = picks.start(part, parts); i < stop; ++i) {
            if (i + AHEAD < stop) prefetch(pre_values + picks.rows[i + AHEAD] * width, width, false);
            rho[i] = dot(pre_values + picks.rows[i] * width, input.at(picks.token(i)), width);
        }
    });
}

// out [T, E * Dv] holds zeros: tokens without picks are not written.
template <typename Table, typename Acc>
void weighted_sum(const Picks& picks, const Acc* weights, int64_t cores, const Table* values, int64_t width,
                  int64_t num_blocks, Table* out, int64_t threads) {
    const int64_t slice = width / cores, out_width = num_blocks * width;
    in_parallel(threads, picks.count, [&](int64_t part, int64_t parts) {
        std::vector<Acc> sum(static_cast<size_t>(out_width));
        const int64_t stop = picks.start(part + 1, parts);
        for (int64_t i = picks.start(part, parts); i < stop;) {
            const int64_t token = picks.token(i);
            std::fill(sum.begin(), sum.end(), Acc(0));
            for (; i < stop && picks.token(i) == token; ++i) {
                if (i + AHEAD < stop) prefetch(values + picks.rows[i + AHEAD] * width, width, false);
                const Table* row = values + picks.rows[i] * width;
                Acc* to = sum.data() + picks.block(i) * width;
                for (int64_t c = 0; c < cores; ++c)
                    add_to_scratch(to + c * slice, weights[i * cores + c], row + c * slice, slice);
            }
            for (int64_t j = 0; j < out_width; ++j) narrow(sum[static_cast<size_t>(j)], out[token * out_width + j]);
        }
    });
}

// Both of the above at once: while a pick's pre-value row is multiplied, the rows of coming picks are on their way from
// both tables. rho is kept for the backward. out holds zeros.
template <typename Table, typename Acc>
void one_pass(const Picks& picks, const Acc* scores, int64_t cores, const Table* projected, const Table* pre_values,
              int64_t pre_width, const Table* values, int64_t width, int64_t num_blocks, Acc* rho, Table* out,
              int64_t threads) {
    const int64_t slice = width / cores, out_width = num_blocks * width;
    in_parallel(threads, picks.count, [&](int64_t part, int64_t parts) {
        TokenVector<Table, Acc> input(projected, pre_width);
        std::vector<Acc> sum(static_cast<size_t>(out_width));
        const int64_t stop = picks.start(part + 1, parts);
        for (int64_t i = picks.start(part, parts); i < stop;) {
            const int64_t token = picks.token(i);
            const Acc* x = input.at(token);
            std::fill(sum.begin(), sum.end(), Acc(0));
            for (; i < stop && picks.token(i) == token; ++i) {
                if (i + AHEAD_IN_BOTH < stop) {
                    prefetch(pre_values + picks.rows[i + AHEAD_IN_BOTH] * pre_width, pre_width, false);
                    prefetch(values + picks.rows[i + AHEAD_IN_BOTH] * width, width, false);
                }
                rho[i] = dot(pre_values + picks.rows[i] * pre_width, x, pre_width);
                const Table* row = values + picks.rows[i] * width;
                Acc* to = sum.data() + picks.block(i) * width;
                for (int64_t c = 0; c < cores; ++c)
                    add_to_scratch(to + c * slice, scores[i * cores + c] * rho[i], row + c * slice, slice);
            }
            for (int64_t j = 0; j < out_width; ++j) narrow(sum[static_cast<size_t>(j)], out[token * out_width + j]);
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
            if (k + AHEAD < mine.size()) {
                const int64_t next = picks.rows[mine[k + AHEAD]] * width;
                prefetch(values + next, width, false);
                if (value_sum) prefetch(value_sum + next, width, true);
            }
            const int64_t i = mine[k], place = picks.rows[i] * width;
            const Acc* grad = upstream.at(picks.token(i)) + picks.block(i) * width;
            for (int64_t c = 0; c < cores; ++c) {
                const int64_t left = c * slice;
                weight_grad[i * cores + c] = dot(values + place + left, grad + left, slice);
                if (value_sum) add_to_row(value_sum + place + left, weights[i * cores + c], grad + left, slice);
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
        const int64_t stop = picks.start(part + 1, parts);
        for (int64_t i = picks.start(part, parts); i < stop;) {
            const int64_t token = picks.token(i);
            std::fill(sum.begin(), sum.end(), Acc(0));
            for (; i < stop && picks.token(i) == token; ++i) {
                if (i + AHEAD < stop) prefetch(pre_values + picks.rows[i + AHEAD] * width, width, false);
                add_to_scratch(sum.data(), rho_grad[i], pre_values + picks.rows[i] * width, width);
            }
            for (int64_t j = 0; j < width; ++j) narrow(sum[static_cast<size_t>(j)], projected_grad[token * width + j]);
        }
        if (!pre_value_sum) return;
        TokenVector<Table, Acc> input(projected, width);
        const std::vector<int64_t> mine = picks.owned(part, parts);
        for (size_t k = 0; k < mine.size(); ++k) {
            if (k + AHEAD < mine.size()) prefetch(pre_value_sum + picks.rows[mine[k + AHEAD]] * width, width, true);
            const int64_t i = mine[k];
            add_to_row(pre_value_sum + picks.rows[i] * width, rho_grad[i], input.at(picks.token(i)), width);
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
