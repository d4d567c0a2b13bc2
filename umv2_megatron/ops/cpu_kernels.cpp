// The parts of the lookup for CPUs; cpu.py calls them, interface.py says what they compute.
//
// Who writes what: a token's sums belong to the thread that has the token, a row of a table's gradient to the thread
// that owns the row. So there are no atomics, and every sum is added up in the order of the picks: results are the
// same bit by bit from run to run and for any number of threads. Rows of a large table are cache misses, so each
// thread asks for the rows of coming picks ahead of time (AHEAD); the arithmetic hides behind the memory. A backward
// reads rows by token first, which several threads can do without writing to each other's cache lines, then adds to
// gradients by row.
//
// Table: element type of a table, of the projected input, of the output and of its gradient. Acc: what is added up in
// and the type of scores and weights (float; double for double tables). Sum: element type of a table's gradient.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu_picks.h"
#include "cpu_rows.h"
#include "cpu_threads.h"

namespace {

constexpr int64_t TOGETHER = 4;  // rows whose products with one vector are computed together

using umv2::bfloat16;
using umv2::in_parallel;
using umv2::OwnPicks;
using umv2::Picks;
using umv2::picks_ahead;
using umv2::Rows;
using umv2::TokenVector;

// Calls each(token, first, last, end) for every token of this thread and its picks [first, last); the thread's end at `end`.
template <typename Each>
inline void by_token(const Picks& picks, int64_t part, int64_t parts, const Each& each) {
    const int64_t end = picks.start(part + 1, parts);
    for (int64_t first = picks.start(part, parts), last; first < end; first = last) {
        last = picks.same_token(first, end);
        each(picks.token(first), first, last, end);
    }
}

// Calls group(i, count) for the picks [first, last), TOGETHER at once. Before a group it asks for the rows that come a certain
// number of picks later: all at once, and of one table, because what is read between requests waits for one of the same few
// buffers, and so does a request behind too many others.
template <typename Table, typename Group>
inline void in_groups(const Picks& picks, int64_t first, int64_t last, int64_t end, const Rows<Table>& table,
                      const Group& group) {
    const int64_t ahead = picks_ahead(table.bytes());
    for (int64_t i = first; i < last; i += TOGETHER) {
        const int64_t count = std::min(TOGETHER, last - i), asked = std::min(end, i + count + ahead);
        for (int64_t next = i + ahead; next < asked; ++next) table.ask(picks.rows[next]);
        group(i, count);
    }
}

// out[n] = < columns from `left` of the row of pick i + n, x >, n < count <= TOGETHER.
template <typename Table, typename Acc>
inline void few_dots(const Picks& picks, int64_t i, int64_t count, const Rows<const Table>& table, int64_t left, const Acc* x,
                     int64_t width, Acc* out) {
    const auto row = [&](int64_t n) { return table.at(picks.rows[i + n]) + left; };
    if (count == TOGETHER) return umv2::dots<TOGETHER>(row, x, width, out);
    for (int64_t n = 0; n < count; ++n) umv2::dots<1>([&](int64_t) { return row(n); }, x, width, out + n);
}

// sum [E * width] += the weighted rows of picks [i, i + count) of one token; weight(i, c) of pick i under core c.
template <typename Table, typename Acc, typename Weight>
inline void few_sums(const Picks& picks, int64_t i, int64_t count, const Rows<const Table>& table, int64_t cores,
                     const Weight& weight, Acc* sum) {
    const int64_t slice = table.width / cores;
    for (int64_t c = 0; c < cores; ++c) {
        const int64_t left = c * slice;
        if (!picks.blocks) {
            umv2::add_rows(sum + left, slice, count, [&](int64_t n) { return weight(i + n, c); },
                           [&](int64_t n) { return table.at(picks.rows[i + n]) + left; });
            continue;
        }
        for (int64_t n = i; n < i + count; ++n)
            umv2::add_rows(sum + picks.blocks[n] * table.width + left, slice, 1, [&](int64_t) { return weight(n, c); },
                           [&](int64_t) { return table.at(picks.rows[n]) + left; });
    }
}

// A token's sum, as it is written into its result.
template <typename Acc>
class TokenSum {
  public:
    TokenSum(int64_t width, int64_t slice) : slice_(slice), sum_(static_cast<size_t>(width)) {}
    void clear() { std::fill(sum_.begin(), sum_.end(), Acc(0)); }
    Acc* data() { return sum_.data(); }
    template <typename Table>
    void write(Table* all, int64_t token) const {
        const int64_t width = static_cast<int64_t>(sum_.size());
        for (int64_t j = 0; j < width; j += slice_) umv2::convert_row(sum_.data() + j, slice_, all + token * width + j);
    }

  private:
    int64_t slice_;
    std::vector<Acc> sum_;
};

template <typename Table, typename Acc>
void pre_scores(const Picks& picks, const Table* projected, Rows<const Table> pre_values, Acc* rho, int64_t threads) {
    in_parallel(threads, picks, [&](int64_t part, int64_t parts) {
        TokenVector<Table, Acc> input(projected, pre_values.width, pre_values.width);
        by_token(picks, part, parts, [&](int64_t token, int64_t first, int64_t last, int64_t end) {
            const Acc* x = input.at(token);
            in_groups(picks, first, last, end, pre_values, [&](int64_t i, int64_t count) {
                few_dots(picks, i, count, pre_values, 0, x, pre_values.width, rho + i);
            });
        });
    });
}

// out [T, E * Dv]; tokens without picks are not written.
template <typename Table, typename Acc>
void weighted_sum(const Picks& picks, const Acc* weights, int64_t cores, Rows<const Table> values, int64_t num_blocks,
                  Table* out, int64_t threads) {
    const auto weight = [&](int64_t n, int64_t c) { return weights[n * cores + c]; };
    in_parallel(threads, picks, [&](int64_t part, int64_t parts) {
        TokenSum<Acc> sum(num_blocks * values.width, values.width / cores);
        by_token(picks, part, parts, [&](int64_t token, int64_t first, int64_t last, int64_t end) {
            sum.clear();
            in_groups(picks, first, last, end, values, [&](int64_t i, int64_t count) {
                few_sums(picks, i, count, values, cores, weight, sum.data());
            });
            sum.write(out, token);
        });
    });
}

// Both of the above, token by token. rho is kept for the backward.
template <typename Table, typename Acc>
void one_pass(const Picks& picks, const Acc* scores, int64_t cores, const Table* projected, Rows<const Table> pre_values,
              Rows<const Table> values, int64_t num_blocks, Acc* rho, Table* out, int64_t threads) {
    const auto weight = [&](int64_t n, int64_t c) { return scores[n * cores + c] * rho[n]; };
    in_parallel(threads, picks, [&](int64_t part, int64_t parts) {
        TokenVector<Table, Acc> input(projected, pre_values.width, pre_values.width);
        TokenSum<Acc> sum(num_blocks * values.width, values.width / cores);
        by_token(picks, part, parts, [&](int64_t token, int64_t first, int64_t last, int64_t end) {
            const Acc* x = input.at(token);
            in_groups(picks, first, last, end, pre_values, [&](int64_t i, int64_t count) {
                few_dots(picks, i, count, pre_values, 0, x, pre_values.width, rho + i);
            });
            sum.clear();
            in_groups(picks, first, last, end, values, [&](int64_t i, int64_t count) {
                few_sums(picks, i, count, values, cores, weight, sum.data());
            });
            sum.write(out, token);
        });
    });
}

// found(i, c, g) for picks [i, i + count) of a token and every core c: g = < slice c of the row, slice c of grad >, where
// grad [E * Dv] is the token's.
template <typename Table, typename Acc, typename Found>
inline void few_gradients(const Picks& picks, int64_t i, int64_t count, const Rows<const Table>& values, int64_t cores,
                          const Acc* grad, const Found& found) {
    const int64_t slice = values.width / cores;
    Acc out[TOGETHER];
    for (int64_t c = 0; c < cores; ++c) {
        const int64_t left = c * slice;
        if (!picks.blocks)
            few_dots(picks, i, count, values, left, grad + left, slice, out);
        else
            for (int64_t n = 0; n < count; ++n)
                few_dots(picks, i + n, 1, values, left, grad + picks.blocks[i + n] * values.width + left, slice, out + n);
        for (int64_t n = 0; n < count; ++n) found(i + n, c, out[n]);
    }
}

// Adds weight(i, c) * slice c of the vector [E * width] of its token to the row of every pick; total may be null.
template <typename Table, typename Acc, typename Sum, typename Weight>
void add_to_gradient(const Picks& picks, const Table* vectors, int64_t num_blocks, int64_t cores, Rows<Sum> total,
                     const Weight& weight, int64_t threads) {
    if (!total.data) return;
    const int64_t slice = total.width / cores;
    in_parallel(threads, picks, [&](int64_t part, int64_t parts) {
        TokenVector<Table, Acc, Sum> upstream(vectors, num_blocks * total.width, slice);
        OwnPicks own(picks, part, parts, picks_ahead(total.bytes()));
        for (int64_t i; (i = own.next()) >= 0;) {
            const int64_t next = own.coming(), row = picks.rows[i];
            if (next >= 0) total.ask(picks.rows[next]);
            const Acc* vector = upstream.at(own.token(i)) + picks.block(i) * total.width;
            for (int64_t c = 0; c < cores; ++c)
                umv2::add_to_row(total.at(row) + c * slice, weight(i, c), vector + c * slice, slice);
        }
    });
}

// value_sum may be null.
template <typename Table, typename Acc, typename Sum>
void weighted_sum_backward(const Picks& picks, const Acc* weights, int64_t cores, const Table* grad_out,
                           Rows<const Table> values, int64_t num_blocks, Acc* weight_grad, Rows<Sum> value_sum,
                           int64_t threads) {
    in_parallel(threads, picks, [&](int64_t part, int64_t parts) {
        TokenVector<Table, Acc> upstream(grad_out, num_blocks * values.width, values.width / cores);
        by_token(picks, part, parts, [&](int64_t token, int64_t first, int64_t last, int64_t end) {
            const Acc* grad = upstream.at(token);
            in_groups(picks, first, last, end, values, [&](int64_t i, int64_t count) {
                few_gradients(picks, i, count, values, cores, grad,
                              [&](int64_t n, int64_t c, Acc found) { weight_grad[n * cores + c] = found; });
            });
        });
    });
    const auto weight = [&](int64_t i, int64_t c) { return weights[i * cores + c]; };
    add_to_gradient<Table, Acc>(picks, grad_out, num_blocks, cores, value_sum, weight, threads);
}

// projected_grad [T, Dp]: tokens without picks are not written; pre_value_sum may be null.
template <typename Table, typename Acc, typename Sum>
void pre_scores_backward(const Picks& picks, const Acc* rho_grad, const Table* projected, Rows<const Table> pre_values,
                         Table* projected_grad, Rows<Sum> pre_value_sum, int64_t threads) {
    const auto weight = [&](int64_t i, int64_t) { return rho_grad[i]; };
    weighted_sum(picks, rho_grad, 1, pre_values, 1, projected_grad, threads);
    add_to_gradient<Table, Acc>(picks, projected, 1, 1, pre_value_sum, weight, threads);
}

// Both of the above at once, for weights that are scores * rho; rho_grad [n] is room for numbers on their way. The two sums
// may be null.
template <typename Table, typename Acc, typename Sum>
void one_pass_backward(const Picks& picks, const Acc* scores, int64_t cores, const Acc* rho, const Table* projected,
                       Rows<const Table> pre_values, const Table* grad_out, Rows<const Table> values, int64_t num_blocks,
                       Acc* score_grad, Acc* rho_grad, Table* projected_grad, Rows<Sum> value_sum, Rows<Sum> pre_value_sum,
                       int64_t threads) {
    Picks all = picks;
    all.blocks = nullptr;
    const auto rho_weight = [&](int64_t i, int64_t) { return rho_grad[i]; };
    in_parallel(threads, picks, [&](int64_t part, int64_t parts) {
        TokenVector<Table, Acc> upstream(grad_out, num_blocks * values.width, values.width / cores);
        TokenSum<Acc> sum(pre_values.width, pre_values.width);
        by_token(picks, part, parts, [&](int64_t token, int64_t first, int64_t last, int64_t end) {
            const Acc* grad = upstream.at(token);
            std::fill(rho_grad + first, rho_grad + last, Acc(0));
            in_groups(picks, first, last, end, values, [&](int64_t i, int64_t count) {
                few_gradients(picks, i, count, values, cores, grad, [&](int64_t n, int64_t c, Acc found) {
                    score_grad[n * cores + c] = found * rho[n];
                    rho_grad[n] += found * scores[n * cores + c];
                });
            });
            sum.clear();
            in_groups(picks, first, last, end, pre_values, [&](int64_t i, int64_t count) {
                few_sums(all, i, count, pre_values, 1, rho_weight, sum.data());
            });
            sum.write(projected_grad, token);
        });
    });
    const auto weight = [&](int64_t i, int64_t c) { return scores[i * cores + c] * rho[i]; };
    add_to_gradient<Table, Acc>(picks, grad_out, num_blocks, cores, value_sum, weight, threads);
    add_to_gradient<Table, Acc>(all, projected, 1, 1, pre_value_sum, rho_weight, threads);
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

}  // extern "C"

namespace {

// Calls body(picks, T, A, S) with an object of the element types of a table, of sums and of a table's gradient.
template <typename Body>
int with_types(const Call* call, const Body& body) {
    const Picks picks{call->rows, call->blocks, call->tokens, call->picks, call->per_token};
    if (!picks.inside(call->num_rows, call->num_blocks)) return 1;
    if (call->table_dtype == FLOAT32) body(picks, float(), float(), float());
    else if (call->table_dtype == FLOAT64) body(picks, double(), double(), double());
    else if (call->sum_dtype == FLOAT32) body(picks, bfloat16(), float(), float());
    else body(picks, bfloat16(), float(), bfloat16());
    return 0;
}

// An untyped pointer, as what a function asks for.
struct Any {
    const void* data;

    template <typename T>
    operator T*() const {
        return static_cast<T*>(const_cast<void*>(data));
    }
};

}  // namespace

extern "C" {

int umv2_pre_scores(const Call* call, const void* projected, const void* pre_values, void* rho) {
    return with_types(call, [&](const Picks& picks, auto table, auto acc, auto) {
        pre_scores<decltype(table), decltype(acc)>(picks, Any{projected}, {Any{pre_values}, call->width}, Any{rho},
                                                   call->threads);
    });
}

int umv2_weighted_sum(const Call* call, const void* weights, const void* values, void* out) {
    return with_types(call, [&](const Picks& picks, auto table, auto acc, auto) {
        weighted_sum<decltype(table), decltype(acc)>(picks, Any{weights}, call->cores, {Any{values}, call->width},
                                                     call->num_blocks, Any{out}, call->threads);
    });
}

int umv2_one_pass(const Call* call, const void* scores, const void* projected, const void* pre_values,
                  const void* values, void* rho, void* out) {
    return with_types(call, [&](const Picks& picks, auto table, auto acc, auto) {
        one_pass<decltype(table), decltype(acc)>(picks, Any{scores}, call->cores, Any{projected},
                                                 {Any{pre_values}, call->pre_width}, {Any{values}, call->width},
                                                 call->num_blocks, Any{rho}, Any{out}, call->threads);
    });
}

int umv2_weighted_sum_backward(const Call* call, const void* weights, const void* grad_out, const void* values,
                               void* weight_grad, void* value_sum) {
    return with_types(call, [&](const Picks& picks, auto table, auto acc, auto sum) {
        weighted_sum_backward<decltype(table), decltype(acc), decltype(sum)>(
            picks, Any{weights}, call->cores, Any{grad_out}, {Any{values}, call->width}, call->num_blocks,
            Any{weight_grad}, {Any{value_sum}, call->width}, call->threads);
    });
}

int umv2_pre_scores_backward(const Call* call, const void* rho_grad, const void* projected, const void* pre_values,
                             void* projected_grad, void* pre_value_sum) {
    return with_types(call, [&](const Picks& picks, auto table, auto acc, auto sum) {
        pre_scores_backward<decltype(table), decltype(acc), decltype(sum)>(
            picks, Any{rho_grad}, Any{projected}, {Any{pre_values}, call->width}, Any{projected_grad},
            {Any{pre_value_sum}, call->width}, call->threads);
    });
}

int umv2_one_pass_backward(const Call* call, const void* scores, const void* rho, const void* projected,
                           const void* pre_values, const void* grad_out, const void* values, void* score_grad,
                           void* rho_grad, void* projected_grad, void* value_sum, void* pre_value_sum) {
    return with_types(call, [&](const Picks& picks, auto table, auto acc, auto sum) {
        one_pass_backward<decltype(table), decltype(acc), decltype(sum)>(
            picks, Any{scores}, call->cores, Any{rho}, Any{projected}, {Any{pre_values}, call->pre_width}, Any{grad_out},
            {Any{values}, call->width}, call->num_blocks, Any{score_grad}, Any{rho_grad}, Any{projected_grad},
            {Any{value_sum}, call->width}, {Any{pre_value_sum}, call->pre_width}, call->threads);
    });
}

}  // extern "C"
