// Fast feedforward, leaves: tokens sorted by leaf, then each leaf's small MLP on its own tokens.
//
// A counting sort gives each leaf its tokens in their order. An item of work is a leaf with some of its tokens (or, for
// the gradients of weights, with some of their rows), so few or uneven leaves still occupy every thread. Tokens are read
// and written where they lie; so are the weights, which fit a cache.
//
// Every function returns 0, OUT_OF_RANGE or NO_MEMORY. Tensors are contiguous, S is fp32 or bf16, sums are fp32.

#include "fff/calls.hpp"

namespace {

using namespace fff;

constexpr int64_t TOKENS = 16 * ROWS;  // of an item, at most: their hidden values stay in the second-level cache
constexpr int64_t BLOCK = 16 * ROWS;   // rows of the gradient of W1 in an item
constexpr int64_t COLUMNS = 96;        // columns of the gradient of W2 in an item

struct Core {  // as native.py packs it, a call's own numbers first; what a function does not use is 0
    const void* x;
    void* y;
    int64_t T, threads;
    const void *w1, *b1, *w2, *b2, *node_weight, *node_bias;
    int64_t D, E, L, H, is_bf16, activation;
};

struct Call : Core {
    const int64_t* leaf;
    const void *gate, *pre, *grad;
    void *pre_out, *dx, *dgate, *dw1, *db1, *dw2, *db2;
    const void *t_x, *t_gate, *t_w1, *t_b1, *t_w2, *t_b2;
};

template <class S>
const S* in(const void* at) { return static_cast<const S*>(at); }
template <class S>
S* out(void* at) { return static_cast<S*>(at); }

// ---- tokens by leaf ----

struct Sorted {
    std::vector<int64_t> start;  // leaf e has order[start[e]] .. order[start[e + 1]]
    std::vector<int32_t> order;
};

bool sort_by_leaf(const int64_t* leaf, const Call& c, Sorted& sorted) {
    sorted.start.assign(size_t(c.L) + 2, 0);
    sorted.order.resize(size_t(c.T));
    int64_t* start = sorted.start.data();
    for (int64_t t = 0; t < c.T; ++t) {
        if (leaf[t] < 0 || leaf[t] >= c.L) return false;
        ++start[leaf[t] + 2];
    }
    for (int64_t e = 0; e < c.L; ++e) start[e + 2] += start[e + 1];
    for (int64_t t = 0; t < c.T; ++t) sorted.order[size_t(start[leaf[t] + 1]++)] = int32_t(t);
    return true;
}

struct Item {
    int64_t leaf, from, count;  // `count` of the sorted tokens
};

// Near-equal parts of the tokens of every leaf, small enough that every thread gets some.
std::vector<Item> token_items(const Sorted& sorted, const Call& c) {
    std::vector<Item> items;
    const int64_t fair = (c.T + 2 * c.threads - 1) / (2 * c.threads);
    const int64_t most = c.threads == 1 ? TOKENS : std::max<int64_t>(ROWS, std::min(TOKENS, fair));
    for (int64_t e = 0; e < c.L; ++e) {
        const int64_t begin = sorted.start[size_t(e)], count = sorted.start[size_t(e) + 1] - begin;
        if (!count) continue;
        const int64_t parts = (count + most - 1) / most;
        const int64_t each = ((count + parts - 1) / parts + ROWS - 1) / ROWS * ROWS;
        for (int64_t at = 0; at < count; at += each) items.push_back({e, begin + at, std::min(each, count - at)});
    }
    return items;
}

// Scratch of a thread for an item: rows as floats, hidden values twice, panels.
template <class S>
struct Room {
    int64_t tokens, width, rows, size;
    explicit Room(const Call& c, int64_t widest)
        : tokens(std::min(TOKENS, (c.T + ROWS - 1) / ROWS * ROWS)),
          width(padded(c.H)),
          rows(tokens * room_for_floats<S>(widest)),
          size(padded(rows + 2 * tokens * width + product_scratch(tokens))) {}
    float* widened(float* at) const { return at; }
    float* hidden(float* at) const { return at + rows; }
    float* second(float* at) const { return at + rows + tokens * width; }
    float* panels(float* at) const { return at + rows + 2 * tokens * width; }
};

// The rows of an item's tokens in a [T, size] tensor, as floats.
template <class S>
inline void rows_of(const S* base, int64_t size, const int32_t* at, int64_t count, float* room, const float** rows) {
    for (int64_t i = 0; i < count; ++i)
        rows[i] = as_floats(base + at[i] * size, room + i * room_for_floats<S>(size), size);
}

inline void rows_in(const float* base, int64_t width, int64_t count, const float** rows) {
    for (int64_t i = 0; i < count; ++i) rows[i] = base + i * width;
}

// ---- forward ----

// A leaf's weights, to be brought in during a product of so many rows: with few rows, reading them is all there is.
template <class S>
inline Ahead ahead(const S* weights, int64_t leaf, int64_t size, int64_t count) {
    const bool worth = count >= ROWS && size * int64_t(sizeof(S)) <= IN_CACHE;
    return worth ? Ahead::of(weights + leaf * size, size) : Ahead{};
}

template <class S>
inline void forward_item(const Call& c, int64_t e, int64_t then, const int32_t* at, int64_t count, const Room<S>& room,
                         float* own) {
    const int64_t D = c.D, E = c.E, H = c.H, width = room.width;
    const S *b1 = in<S>(c.b1) + e * H, *b2 = in<S>(c.b2) + e * E, *gate = in<S>(c.gate);
    S *pre = out<S>(c.pre_out), *y = out<S>(c.y);
    float* hidden = room.hidden(own);
    const float* rows[TOKENS];
    rows_of(in<S>(c.x), D, at, count, room.widened(own), rows);
    product_of_either(count, D, H, H, rows, 1, in<S>(c.w1) + e * D * H,
                      ahead(in<S>(c.w2), e, H * E, count), room.panels(own),
                      [&](int64_t i, int64_t h, F sum, int) TILES_LAMBDA { simd::store(hidden + i * width + h, sum); });
    with_activation(c.activation, [&](auto kind) {
        for (int64_t i = 0; i < count; ++i)
            each_vector(H, [&](int64_t h, int n) TILES_LAMBDA {
                const F z = simd::load(hidden + i * width + h) + load_some(b1 + h, n);
                if (pre) store_some(pre + at[i] * H + h, z, n);
                simd::store(hidden + i * width + h, simd::activate<kind.value>(z));
            });
    });
    rows_in(hidden, width, count, rows);
    product_of_either(count, H, E, E, rows, 1, in<S>(c.w2) + e * H * E,
                      then == e ? Ahead{} : ahead(in<S>(c.w1), then, D * H, count), room.panels(own),
                      [&](int64_t i, int64_t n, F sum, int size) TILES_LAMBDA {
                          F value = sum + load_some(b2 + n, size);
                          if (gate) value *= simd::splat(widen(gate[at[i]]));
                          store_some(y + at[i] * E + n, value, size);
                      });
}

template <class S>
int forward(const Call& c, const int64_t* leaf) {
    Sorted sorted;
    if (!sort_by_leaf(leaf, c, sorted)) return OUT_OF_RANGE;
    const std::vector<Item> items = token_items(sorted, c);
    const Room<S> room(c, c.D);
    const Buffer scratch(room.size * std::min<int64_t>(c.threads, int64_t(items.size())));
    in_parallel(int64_t(items.size()), int(c.threads), [&](int64_t i, int thread) {
        const Item& item = items[size_t(i)];
        const int64_t then = items[std::min(items.size() - 1, size_t(i + c.threads))].leaf;
        forward_item<S>(c, item.leaf, then, sorted.order.data() + item.from, item.count, room, scratch.at() + thread * room.size);
    });
    return FINE;
}

// ---- routing: right if and only if z > 0, so that a tie and NaN go left ----

template <class S>
int64_t descend(const Core& c, const S* x) {
    const S *weight = in<S>(c.node_weight), *bias = in<S>(c.node_bias);
    int64_t node = 0;
    while (node < c.L - 1) node = 2 * node + 1 + (dot(x, weight + node * c.D, c.D) + widen(bias[node]) > 0.0f);
    return node - (c.L - 1);
}

constexpr int64_t TOKENS_TO_ROUTE = 32;  // together: starting a thread for fewer costs more

template <class S>
void route(const Core& c, int64_t* leaf) {
    in_parallel((c.T + TOKENS_TO_ROUTE - 1) / TOKENS_TO_ROUTE, int(c.threads), [&](int64_t part, int) {
        for (int64_t t = part * TOKENS_TO_ROUTE; t < std::min(c.T, (part + 1) * TOKENS_TO_ROUTE); ++t)
            leaf[t] = descend(c, in<S>(c.x) + t * c.D);
    });
}

// ---- backward ----

// Sorted by leaf, [T, width]: what W1's and W2's gradients multiply, g act and d pre.
struct Hidden {
    Buffer act, dpre;
    Hidden(int64_t T, int64_t width) : act(T * width), dpre(T * width) {}
};

template <class S>
inline void backward_tokens(const Call& c, const Item& item, const int32_t* at, const Room<S>& room, float* own,
                            const Hidden& all) {
    const int64_t e = item.leaf, count = item.count, D = c.D, E = c.E, H = c.H, width = room.width;
    const S *gate = in<S>(c.gate), *pre = in<S>(c.pre), *b2 = in<S>(c.b2) + e * E;
    S *dx = out<S>(c.dx), *dgate = out<S>(c.dgate);
    float *back = room.hidden(own), *act = all.act.at() + item.from * width, *dpre = all.dpre.at() + item.from * width;
    const float* rows[TOKENS];
    rows_of(in<S>(c.grad), E, at, count, room.widened(own), rows);
    product(count, E, H, rows, 1, Turned<S>{in<S>(c.w2) + e * H * E, E}, room.panels(own),
            [&](int64_t i, int64_t h, F sum, int) TILES_LAMBDA { simd::store(back + i * width + h, sum); });
    with_activation(c.activation, [&](auto kind) {
        for (int64_t i = 0; i < count; ++i) {
            const F g = simd::splat(gate ? widen(gate[at[i]]) : 1.0f);
            F inner = {};
            each_vector(H, [&](int64_t h, int n) TILES_LAMBDA {
                const simd::Activated a = simd::activated<kind.value>(load_some(pre + at[i] * H + h, n));
                const F by = simd::load(back + i * width + h);
                inner += a.value * by;  // past H both are zero
                simd::store(act + i * width + h, g * a.value);
                simd::store(dpre + i * width + h, g * by * a.slope);
            });
            put_one(dgate + at[i], simd::sum(inner) + dot(rows[i], b2, E));
        }
    });
    rows_in(dpre, width, count, rows);
    product(count, H, D, rows, 1, Turned<S>{in<S>(c.w1) + e * D * H, H}, room.panels(own),
            [&](int64_t i, int64_t n, F sum, int size) TILES_LAMBDA { store_some(dx + at[i] * D + n, sum, size); });
}

// Rows d0.. of one leaf's d W1 = X^T dpre, from all its tokens; with the first of them d b1.
template <class S>
inline void backward_w1(const Call& c, int64_t e, int64_t d0, const int32_t* at, int64_t count, const float* dpre,
                        float* turned, float* panels) {
    const int64_t D = c.D, H = c.H, width = padded(H), high = std::min(BLOCK, D - d0);
    S *dw1 = out<S>(c.dw1) + (e * D + d0) * H, *db1 = out<S>(c.db1) + e * H;
    if (!count) std::memset(static_cast<void*>(dw1), 0, sizeof(S) * size_t(high * H));
    if (d0 == 0)
        each_vector(H, [&](int64_t h, int n) TILES_LAMBDA {
            F sum = {};
            for (int64_t i = 0; i < count; ++i) sum += simd::load(dpre + i * width + h);
            store_some(db1 + h, sum, n);
        });
    if (!count) return;
    for (int64_t i = 0; i < count; ++i) widen_row(in<S>(c.x) + at[i] * D + d0, turned + i * BLOCK, high);
    const float* rows[BLOCK];
    rows_in(turned, 1, high, rows);
    product_of_either(high, count, width, H, rows, BLOCK, dpre, Ahead{}, panels,
                      [&](int64_t i, int64_t h, F sum, int n) TILES_LAMBDA { store_some(dw1 + i * H + h, sum, n); });
}

// Columns n0.. of one leaf's d W2 = (g act)^T dy, from all its tokens, and of d b2.
template <class S>
inline void backward_w2(const Call& c, int64_t e, int64_t n0, const int32_t* at, int64_t count, const float* act,
                        float* panels) {
    const int64_t E = c.E, H = c.H, width = padded(H), wide = std::min(COLUMNS, E - n0);
    const S *grad = in<S>(c.grad) + n0, *gate = in<S>(c.gate);
    S *dw2 = out<S>(c.dw2) + e * H * E + n0, *db2 = out<S>(c.db2) + e * E + n0;
    each_vector(wide, [&](int64_t n, int size) TILES_LAMBDA {
        F sum = {};
        for (int64_t i = 0; i < count; ++i)
            sum = simd::fma(simd::splat(gate ? widen(gate[at[i]]) : 1.0f), load_some(grad + at[i] * E + n, size), sum);
        store_some(db2 + n, sum, size);
    });
    const float* rows[BLOCK];
    for (int64_t h0 = 0; h0 < H; h0 += BLOCK) {
        const int64_t high = std::min(BLOCK, H - h0);
        if (!count)
            for (int64_t h = h0; h < h0 + high; ++h) std::memset(static_cast<void*>(dw2 + h * E), 0, sizeof(S) * size_t(wide));
        if (!count) continue;
        rows_in(act + h0, 1, high, rows);
        product(high, count, wide, rows, width, Gathered<S>{grad, E, at}, panels,
                [&](int64_t i, int64_t n, F sum, int size) TILES_LAMBDA { store_some(dw2 + (h0 + i) * E + n, sum, size); });
    }
}

template <class S>
void backward_weights(const Call& c, const Sorted& sorted, const Hidden& all) {
    const int64_t blocks = std::max<int64_t>(1, (c.D + BLOCK - 1) / BLOCK), parts = blocks + (c.E + COLUMNS - 1) / COLUMNS;
    int64_t most = 0;
    for (int64_t e = 0; e < c.L; ++e) most = std::max(most, sorted.start[size_t(e) + 1] - sorted.start[size_t(e)]);
    const int64_t width = padded(c.H), each = padded(most * BLOCK + product_scratch(BLOCK));
    const Buffer scratch(each * c.threads);
    in_parallel(c.L * parts, int(c.threads), [&](int64_t i, int thread) {
        const int64_t e = i / parts, part = i % parts, from = sorted.start[size_t(e)];
        const int64_t count = sorted.start[size_t(e) + 1] - from;
        const int32_t* at = sorted.order.data() + from;
        float *turned = scratch.at() + thread * each, *panels = turned + most * BLOCK;
        if (part < blocks)
            backward_w1<S>(c, e, part * BLOCK, at, count, all.dpre.at() + from * width, turned, panels);
        else
            backward_w2<S>(c, e, (part - blocks) * COLUMNS, at, count, all.act.at() + from * width, panels);
    });
}

template <class S>
int backward(const Call& c) {
    Sorted sorted;
    if (!sort_by_leaf(c.leaf, c, sorted)) return OUT_OF_RANGE;
    const std::vector<Item> items = token_items(sorted, c);
    const Room<S> room(c, c.E);
    const Hidden all(c.T, room.width);
    const Buffer scratch(room.size * c.threads);
    in_parallel(int64_t(items.size()), int(c.threads), [&](int64_t i, int thread) {
        const Item& item = items[size_t(i)];
        backward_tokens<S>(c, item, sorted.order.data() + item.from, room, scratch.at() + thread * room.size, all);
    });
    backward_weights<S>(c, sorted, all);
    return FINE;
}

// ---- forward derivative ----

template <class S>
inline void tangent_item(const Call& c, const Item& item, const int32_t* at, const Room<S>& room, float* own, float* sums) {
    const int64_t e = item.leaf, count = item.count, D = c.D, E = c.E, H = c.H, width = room.width;
    const S *gate = in<S>(c.gate), *pre = in<S>(c.pre), *b2 = in<S>(c.b2) + e * E;
    const S *t_gate = in<S>(c.t_gate), *t_b1 = c.t_b1 ? in<S>(c.t_b1) + e * H : nullptr;
    const S* t_b2 = c.t_b2 ? in<S>(c.t_b2) + e * E : nullptr;
    float *mixed = room.hidden(own), *act = room.second(own);
    const float* rows[TOKENS];
    std::fill(mixed, mixed + count * width, 0.0f);
    const auto add_product = [&](const void* x, const void* w1) {
        rows_of(in<S>(x), D, at, count, room.widened(own), rows);
        product_of_either(count, D, H, H, rows, 1, in<S>(w1) + e * D * H, Ahead{}, room.panels(own),
                          [&](int64_t i, int64_t h, F sum, int) TILES_LAMBDA {
                              float* to = mixed + i * width + h;
                              simd::store(to, simd::load(to) + sum);
                          });
    };
    if (c.t_x) add_product(c.t_x, c.w1);
    if (c.t_w1) add_product(c.x, c.t_w1);
    const auto gates = [&](int64_t i) TILES_LAMBDA { return simd::splat(gate ? widen(gate[at[i]]) : 1.0f); };
    with_activation(c.activation, [&](auto kind) {
        for (int64_t i = 0; i < count; ++i)
            each_vector(H, [&](int64_t h, int n) TILES_LAMBDA {
                const simd::Activated a = simd::activated<kind.value>(load_some(pre + at[i] * H + h, n));
                F dpre = simd::load(mixed + i * width + h);
                if (t_b1) dpre += load_some(t_b1 + h, n);
                F out = gates(i) * a.slope * dpre;
                if (t_gate) out += simd::splat(widen(t_gate[at[i]])) * a.value;
                simd::store(mixed + i * width + h, out);
                simd::store(act + i * width + h, gates(i) * a.value);
            });
    });
    if (c.t_w2) {
        rows_in(act, width, count, rows);
        product_of_either(count, H, E, E, rows, 1, in<S>(c.t_w2) + e * H * E, Ahead{}, room.panels(own),
                          [&](int64_t i, int64_t n, F sum, int) TILES_LAMBDA { simd::store(sums + i * padded(E) + n, sum); });
    }
    rows_in(mixed, width, count, rows);
    product_of_either(count, H, E, E, rows, 1, in<S>(c.w2) + e * H * E, Ahead{}, room.panels(own),
                      [&](int64_t i, int64_t n, F sum, int size) TILES_LAMBDA {
                          if (c.t_w2) sum += simd::load(sums + i * padded(E) + n);
                          if (t_b2) sum += gates(i) * load_some(t_b2 + n, size);
                          if (t_gate) sum += simd::splat(widen(t_gate[at[i]])) * load_some(b2 + n, size);
                          store_some(out<S>(c.y) + at[i] * E + n, sum, size);
                      });
}

template <class S>
int tangent(const Call& c) {
    Sorted sorted;
    if (!sort_by_leaf(c.leaf, c, sorted)) return OUT_OF_RANGE;
    const std::vector<Item> items = token_items(sorted, c);
    const Room<S> room(c, c.D);
    const int64_t each = room.size + (c.t_w2 ? room.tokens * padded(c.E) : 0);
    const Buffer scratch(each * c.threads);
    in_parallel(int64_t(items.size()), int(c.threads), [&](int64_t i, int thread) {
        const Item& item = items[size_t(i)];
        float* own = scratch.at() + thread * each;
        tangent_item<S>(c, item, sorted.order.data() + item.from, room, own, own + room.size);
    });
    return FINE;
}

}  // namespace

extern "C" int leaf_forward(const Call* call) {
    return with_type(call->is_bf16, [&](auto zero) { return forward<decltype(zero)>(*call, call->leaf); });
}

extern "C" int leaf_backward(const Call* call) {
    return with_type(call->is_bf16, [&](auto zero) { return backward<decltype(zero)>(*call); });
}

extern "C" int leaf_jvp(const Call* call) {
    return with_type(call->is_bf16, [&](auto zero) { return tangent<decltype(zero)>(*call); });
}

extern "C" int route_tokens(const Core* core) {  // y takes the leaves, int64
    return with_type(core->is_bf16, [&](auto zero) {
        route<decltype(zero)>(*core, out<int64_t>(core->y));
        return FINE;
    });
}

extern "C" int leaf_infer(const Core* core) {
    return with_type(core->is_bf16, [&](auto zero) {
        Call call{};
        static_cast<Core&>(call) = *core;
        std::vector<int64_t> leaf(size_t(core->T));
        route<decltype(zero)>(*core, leaf.data());
        return forward<decltype(zero)>(call, leaf.data());
    });
}
