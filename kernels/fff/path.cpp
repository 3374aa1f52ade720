// Fast feedforward, paths: every token walks down K trees of single neurons, and a node is two rows of weights.
//
// Nothing is shared between tokens, so the limit is bytes: P (D + E) weights per token and tree. A walk is P products of
// rows, one after the other; what one token waits for is memory, so the beginnings of both children's rows are fetched
// ahead, and of the row of w2 that is passed (one token 3-12 % faster; all of both children's rows: 3-9 % slower). The
// output is one pass over the rows that were passed, its columns in registers. Gradients of weights: the (token, node)
// pairs are sorted by node, so that one thread adds up an element, in the order of the tokens.
//
// Every function returns 0, OUT_OF_RANGE or NO_MEMORY. Tensors are contiguous, S is fp32 or bf16, sums are fp32.

#include "fff/calls.hpp"

namespace {

using namespace fff;

struct Core {  // as native.py packs it, a call's own numbers first; what a function does not use is 0
    const void* x;
    void* y;
    int64_t T, threads;
    const void *w1, *b1, *w2, *b2;
    int64_t D, E, K, N, P, is_bf16, activation;
};

struct Call : Core {
    const void *pre, *grad;
    const int64_t* node;
    void *pre_out, *node_out, *dx, *dw1, *db1, *dw2, *db2;
    const void *t_x, *t_w1, *t_b1, *t_w2, *t_b2;
};

constexpr int64_t TOGETHER = 16;  // tokens of an item

template <class S>
const S* in(const void* at) { return static_cast<const S*>(at); }
template <class S>
S* out(void* at) { return static_cast<S*>(at); }

// Floats of scratch of a thread: two rows as floats, and a factor for every node passed, twice.
template <class S>
struct Room {
    int64_t passed, wide, size;
    explicit Room(const Core& c)
        : passed(c.K * c.P), wide(padded(std::max(c.D, c.E))), size(2 * wide + 2 * padded(passed)) {}
    float* first(float* own) const { return own; }
    float* second(float* own) const { return own + wide; }
    float* factors(float* own) const { return own + 2 * wide; }
    float* more(float* own) const { return own + 2 * wide + padded(passed); }
};

// work(t, scratch of the thread) for every token
template <class S, class Work>
void each_token(const Core& c, Work work) {
    const Room<S> room(c);
    const int64_t items = (c.T + TOGETHER - 1) / TOGETHER;
    const int threads = int(std::min(c.threads, items));
    const Buffer scratch(room.size * std::max(1, threads));
    in_parallel(items, threads, [&](int64_t item, int thread) {
        for (int64_t t = item * TOGETHER; t < std::min(c.T, (item + 1) * TOGETHER); ++t)
            work(t, room, scratch.at() + thread * room.size);
    });
}

// ---- forward ----

constexpr int64_t BEGINNING = 512;  // bytes; the processor itself goes on from there

// Asks for the beginning of a row; LEVEL 3 is the first-level cache, 2 the second.
template <int LEVEL, class S>
TILES_INLINE void fetch(const S* row, int64_t size) {
    const char* at = reinterpret_cast<const char*>(row);
    const char* end = at + std::min(BEGINNING, size * int64_t(sizeof(S)));
    for (; at < end; at += 64) __builtin_prefetch(at, 0, LEVEL);
}

// Fills z and the flat nodes (k N + n) of one token.
template <class S>
inline void walk(const Core& c, const float* x, float* z, int64_t* flat) {
    const S *w1 = in<S>(c.w1), *b1 = in<S>(c.b1);
    for (int64_t k = 0; k < c.K; ++k) {
        int64_t node = 0;
        for (int64_t p = 0; p < c.P; ++p) {
            const int64_t at = k * c.N + node, child = at + node + 1;  // in its tree, 2 node + 1
            fetch<2>(in<S>(c.w2) + at * c.E, c.E);
            if (p + 1 < c.P) {
                fetch<3>(w1 + child * c.D, c.D);
                fetch<3>(w1 + (child + 1) * c.D, c.D);
            }
            const float sum = dot(x, w1 + at * c.D, c.D) + widen(b1[at]);
            z[k * c.P + p] = sum;
            flat[k * c.P + p] = at;
            node = 2 * node + 1 + (sum > 0.0f);  // a tie and NaN go left
        }
    }
}

// y = b2 + sum over the nodes passed of factor w2
template <class S>
inline void leave(const Core& c, const S* w2, const float* factors, const int64_t* flat, const S* b2, const float* add, S* y) {
    gathered_sum(
        c.K * c.P, factors, [=](int64_t i) TILES_LAMBDA { return w2 + flat[i] * c.E; }, 0, c.E,
        [=](int64_t n, F sum, int size) TILES_LAMBDA {
            if (b2) sum += load_some(b2 + n, size);
            if (add) sum += load_some(add + n, size);
            store_some(y + n, sum, size);
        });
}

template <class S>
int forward(const Call& c) {
    const int64_t passed = c.K * c.P;
    std::vector<int64_t> flats(size_t(passed * c.T));
    each_token<S>(c, [&](int64_t t, const Room<S>& room, float* own) {
        float* z = room.factors(own);
        int64_t* flat = flats.data() + t * passed;
        walk<S>(c, as_floats(in<S>(c.x) + t * c.D, room.first(own), c.D), z, flat);
        if (c.pre_out) {
            for (int64_t i = 0; i < passed; ++i) put_one(out<S>(c.pre_out) + t * passed + i, z[i]);
            for (int64_t i = 0; i < passed; ++i) out<int64_t>(c.node_out)[t * passed + i] = flat[i] - i / c.P * c.N;
        }
        with_activation(c.activation, [&](auto kind) {
            each_vector(passed, [&](int64_t i, int size) TILES_LAMBDA {
                store_some(z + i, simd::activate<kind.value>(load_some(z + i, size)), size);
            });
        });
        leave(c, in<S>(c.w2), z, flat, in<S>(c.b2), nullptr, out<S>(c.y) + t * c.E);
    });
    return FINE;
}

// The flat nodes of a call that was given them, [T, K, P]; false where one is outside its tree.
bool flatten(const Call& c, std::vector<int64_t>& flats) {
    flats.resize(size_t(c.T * c.K * c.P));
    for (int64_t i = 0; i < c.T * c.K * c.P; ++i) {
        if (c.node[i] < 0 || c.node[i] >= c.N) return false;
        flats[size_t(i)] = i / c.P % c.K * c.N + c.node[i];
    }
    return true;
}

// ---- backward ----

// For every node passed, sorted by node: its token, d pre and the activation.
struct Pairs {
    std::vector<int64_t> start;  // node n has pairs start[n] .. start[n + 1]
    std::vector<int32_t> place, token;
    Buffer dpre, act;
    Pairs(const Core& c, const std::vector<int64_t>& flats)
        : start(size_t(c.K * c.N) + 2), place(flats.size()), token(flats.size()), dpre(int64_t(flats.size())),
          act(int64_t(flats.size())) {
        for (int64_t at : flats) ++start[size_t(at) + 2];
        for (size_t n = 2; n < start.size(); ++n) start[n] += start[n - 1];
        const int64_t passed = c.K * c.P;
        for (size_t i = 0; i < flats.size(); ++i) {
            place[i] = int32_t(start[size_t(flats[i]) + 1]++);
            token[size_t(place[i])] = int32_t(int64_t(i) / passed);
        }
    }
};

template <class S>
void backward_tokens(const Call& c, const std::vector<int64_t>& flats, const Pairs& pairs) {
    const int64_t passed = c.K * c.P;
    const S *w1 = in<S>(c.w1), *w2 = in<S>(c.w2), *pre = in<S>(c.pre);
    each_token<S>(c, [&](int64_t t, const Room<S>& room, float* own) {
        const int64_t* flat = flats.data() + t * passed;
        float* dpre = room.factors(own);
        const float* grad = as_floats(in<S>(c.grad) + t * c.E, room.first(own), c.E);
        for (int64_t i = 0; i < passed; ++i) dpre[i] = dot(grad, w2 + flat[i] * c.E, c.E);
        with_activation(c.activation, [&](auto kind) {
            each_vector(passed, [&](int64_t i, int size) TILES_LAMBDA {
                const simd::Activated a = simd::activated<kind.value>(load_some(pre + t * passed + i, size));
                store_some(dpre + i, load_some(dpre + i, size) * a.slope, size);
                store_some(room.more(own) + i, a.value, size);
            });
        });
        for (int64_t i = 0; i < passed; ++i) {
            const int64_t to = pairs.place[size_t(t * passed + i)];
            pairs.dpre.at()[to] = dpre[i];
            pairs.act.at()[to] = room.more(own)[i];
        }
        gathered_sum(
            passed, dpre, [=](int64_t i) TILES_LAMBDA { return w1 + flat[i] * c.D; }, 0, c.D,
            [=, &c](int64_t n, F sum, int size) TILES_LAMBDA { store_some(out<S>(c.dx) + t * c.D + n, sum, size); });
    });
}

constexpr int64_t MANY = 64;      // pairs of a node from which its columns are shared out
constexpr int64_t COLUMNS = 192;  // of an item then

struct NodeItem {
    int64_t node, begin, end;  // columns 0..D are of w1, D..D+E of w2
};

std::vector<NodeItem> node_items(const Core& c, const Pairs& pairs) {
    std::vector<NodeItem> items;
    for (int64_t n = 0; n < c.K * c.N; ++n) {
        const int64_t each = pairs.start[size_t(n) + 1] - pairs.start[size_t(n)] < MANY ? c.D + c.E : COLUMNS;
        for (int64_t at = 0; at < c.D; at += each) items.push_back({n, at, std::min(c.D, at + each)});
        for (int64_t at = 0; at < c.E; at += each) items.push_back({n, c.D + at, c.D + std::min(c.E, at + each)});
    }
    return items;
}

// Columns begin..end of sum over i of factor_i rows[token_i], or zeros.
template <class S>
inline void sum_rows(int64_t count, const float* factors, const int32_t* token, const S* rows, int64_t width, int64_t begin,
                     int64_t end, S* to) {
    gathered_sum(
        count, factors, [=](int64_t i) TILES_LAMBDA { return rows + token[i] * width; }, begin, end,
        [=](int64_t n, F sum, int size) TILES_LAMBDA { store_some(to + n, sum, size); });
}

template <class S>
void backward_nodes(const Call& c, const Pairs& pairs) {
    const std::vector<NodeItem> items = node_items(c, pairs);
    constexpr int64_t some = 16;  // items are small: fewer trips to the queue
    in_parallel((int64_t(items.size()) + some - 1) / some, int(c.threads), [&](int64_t part, int) {
        for (int64_t i = part * some; i < std::min(int64_t(items.size()), (part + 1) * some); ++i) {
            const NodeItem& item = items[size_t(i)];
            const int64_t n = item.node, from = pairs.start[size_t(n)], count = pairs.start[size_t(n) + 1] - from;
            const int32_t* token = pairs.token.data() + from;
            const float *dpre = pairs.dpre.at() + from, *act = pairs.act.at() + from;
            if (item.begin < c.D)
                sum_rows(count, dpre, token, in<S>(c.x), c.D, item.begin, item.end, out<S>(c.dw1) + n * c.D);
            else
                sum_rows(count, act, token, in<S>(c.grad), c.E, item.begin - c.D, item.end - c.D, out<S>(c.dw2) + n * c.E);
            if (item.begin == 0) {
                float sum = 0.0f;
                for (int64_t j = 0; j < count; ++j) sum += dpre[j];
                put_one(out<S>(c.db1) + n, sum);
            }
        }
    });
    each_vector(c.E, [&](int64_t n, int size) TILES_LAMBDA {
        F sum = {};
        for (int64_t t = 0; t < c.T; ++t) sum += load_some(in<S>(c.grad) + t * c.E + n, size);
        store_some(out<S>(c.db2) + n, sum, size);
    });
}

template <class S>
int backward(const Call& c) {
    std::vector<int64_t> flats;
    if (!flatten(c, flats)) return OUT_OF_RANGE;
    const Pairs pairs(c, flats);
    backward_tokens<S>(c, flats, pairs);
    backward_nodes<S>(c, pairs);
    return FINE;
}

// ---- forward derivative ----

template <class S>
int tangent(const Call& c) {
    std::vector<int64_t> flats;
    if (!flatten(c, flats)) return OUT_OF_RANGE;
    const int64_t passed = c.K * c.P;
    const S *w1 = in<S>(c.w1), *t_w1 = in<S>(c.t_w1), *t_b1 = in<S>(c.t_b1), *pre = in<S>(c.pre), *t_x = in<S>(c.t_x);
    each_token<S>(c, [&](int64_t t, const Room<S>& room, float* own) {
        const int64_t* flat = flats.data() + t * passed;
        float *factors = room.factors(own), *act = room.more(own), *sums = room.second(own);
        std::fill(factors, factors + passed, 0.0f);
        if (t_x) {
            const float* dx = as_floats(t_x + t * c.D, room.first(own), c.D);
            for (int64_t i = 0; i < passed; ++i) factors[i] += dot(dx, w1 + flat[i] * c.D, c.D);
        }
        if (t_w1) {
            const float* x = as_floats(in<S>(c.x) + t * c.D, room.first(own), c.D);
            for (int64_t i = 0; i < passed; ++i) factors[i] += dot(x, t_w1 + flat[i] * c.D, c.D);
        }
        if (t_b1)
            for (int64_t i = 0; i < passed; ++i) factors[i] += widen(t_b1[flat[i]]);
        with_activation(c.activation, [&](auto kind) {
            each_vector(passed, [&](int64_t i, int size) TILES_LAMBDA {
                const simd::Activated a = simd::activated<kind.value>(load_some(pre + t * passed + i, size));
                store_some(factors + i, load_some(factors + i, size) * a.slope, size);
                store_some(act + i, a.value, size);
            });
        });
        if (c.t_w2)
            gathered_sum(
                passed, act, [=, &c](int64_t i) TILES_LAMBDA { return in<S>(c.t_w2) + flat[i] * c.E; }, 0, c.E,
                [=](int64_t n, F sum, int size) TILES_LAMBDA { store_some(sums + n, sum, size); });
        leave(c, in<S>(c.w2), factors, flat, in<S>(c.t_b2), c.t_w2 ? sums : nullptr, out<S>(c.y) + t * c.E);
    });
    return FINE;
}

}  // namespace

extern "C" int path_forward(const Call* call) {
    return with_type(call->is_bf16, [&](auto zero) { return forward<decltype(zero)>(*call); });
}

extern "C" int path_infer(const Core* core) {
    return with_type(core->is_bf16, [&](auto zero) {
        Call call{};
        static_cast<Core&>(call) = *core;
        return forward<decltype(zero)>(call);
    });
}

extern "C" int path_backward(const Call* call) {
    return with_type(call->is_bf16, [&](auto zero) { return backward<decltype(zero)>(*call); });
}

extern "C" int path_jvp(const Call* call) {
    return with_type(call->is_bf16, [&](auto zero) { return tangent<decltype(zero)>(*call); });
}
