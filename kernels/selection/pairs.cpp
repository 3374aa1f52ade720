// The sums of joint selection over pairs of chosen rows and candidates that still stand; the mathematics is in
// __init__.py. Similarities never leave the first-level cache: a tile of ROWS chosen x WIDTH candidates is summed in
// registers over the whole width D, then the pair loss folds it into a few numbers per candidate.
//
// Both operands are packed into panels: the chosen as [D][ROWS], once per update, the candidates as [D][WIDTH], a block
// of them at a time, so that a block stays in the second-level cache while all chosen stream past it. Rows of fp16 and
// bf16 are widened there. A lane belongs to one candidate and sees the chosen in their order, so no bit of its result
// depends on its neighbours, on the blocks or on the thread.
//
// sigmoid   sum of softplus(x) = sum of max(x, 0) + log of a product of 1 + exp(-|x|), one logarithm per GROUP chosen:
//           with e the excess over 1, (1 + e)(1 + f) = 1 + (e (1 + f) + f), which keeps the relative precision where
//           the factors are 1 + 1e-13. GROUP factors are at most 2**GROUP, far from overflow.
// softmax   a running maximum and the sum of exp(x - maximum), in fp32 for GROUP chosen, then in fp64.
//
// Measured at D = 512 on one core of a Zen 4 with AVX2: 13 ns for a pair of either loss (79 GFLOP/s), of which the loss
// is less than 0.5; MKL takes 15 ns for the product alone, the same in torch 20 (tests/bench/bench_selection.py).

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "native/vector_math.hpp"

namespace {

using simd::F;
using simd::lanes;

#if defined(__AVX512F__)
constexpr int ROWS = 12;  // 24 sums, 2 vectors of candidates and a chosen one in 32 registers
#elif defined(__aarch64__)
constexpr int ROWS = 8;
#else
constexpr int ROWS = 6;  // 12 sums in 16 registers
#endif
constexpr int WIDTH = 2 * lanes;
constexpr int GROUP = 48;                   // chosen per logarithm: a multiple of every ROWS
constexpr int64_t BLOCK_BYTES = 384 << 10;  // of candidates: they stay in the second-level cache
constexpr int STRIP = 64;                   // columns that are turned at a time
static_assert(GROUP % ROWS == 0 && STRIP % 2 == 0 && STRIP % lanes == 0);

enum Status { ok = 0, no_memory = 1, out_of_range = 2 };
enum Stored { as_fp32 = 0, as_fp16 = 1, as_bf16 = 2 };

struct Rows {  // embeddings [count, width] as the caller stores them, `stride` elements from row to row
    const void* data;
    int64_t count, width, stride;
    int32_t stored;
};

struct Direction {  // candidates of one kind against the chosen of the other, by one model
    Rows candidates;
    const void* chosen;  // panels made by pairs_pack_chosen
    double weight;
    float scale, bias;
};

struct Freed {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

template <class T>
std::unique_ptr<T, Freed> aligned(int64_t count) {
    return std::unique_ptr<T, Freed>(static_cast<T*>(::operator new(size_t(count) * sizeof(T), std::align_val_t(64))));
}

template <class Number>
void widen(const Number* from, float* to, int n) {
    int i = 0;
    for (; i + lanes <= n; i += lanes) simd::store(to + i, simd::load(from + i));
    if (i < n) simd::store(to + i, simd::load(from + i, n - i), n - i);
}

void widen_row(const Rows& rows, int64_t at, float* to, int n) {
    if (rows.stored == as_fp16) return widen(static_cast<const simd::f16*>(rows.data) + at, to, n);
    widen(static_cast<const simd::bf16*>(rows.data) + at, to, n);
}

// ---- how two panels are multiplied: one step of the loop over D ----

struct Fp32 {
    using Element = float;
    static int64_t steps(int64_t width) { return width; }

    template <int R>
    static void pack(const float* const (&row)[R], int n, float* to) {
        int d = 0;
        if constexpr (R % lanes == 0)
            for (; d + lanes <= n; d += lanes)
                for (int r = 0; r < R; r += lanes) {
                    F square[lanes];
                    for (int i = 0; i < lanes; ++i) square[i] = simd::load(row[r + i] + d);
                    simd::transpose(square);
                    for (int i = 0; i < lanes; ++i) simd::store(to + (d + i) * R + r, square[i]);
                }
        for (; d < n; ++d)
            for (int r = 0; r < R; ++r) to[d * R + r] = row[r][d];
    }

    static F candidates(const float* at) { return simd::load(at); }
    static F multiply_add(const float* chosen, F candidates, F sum) {
        return simd::fma(simd::splat(*chosen), candidates, sum);
    }
};

// Two bf16 to an element, the one of the even column in the low half. Only products are of bf16; sums are fp32.
struct Bf16 {
    using Element = uint32_t;
    static int64_t steps(int64_t width) { return (width + 1) / 2; }

    template <int R>
    static void pack(const float* const (&row)[R], int n, uint32_t* to) {
        for (int r = 0; r < R; ++r) {
            simd::bf16 narrow[STRIP + 1] = {};
            for (int d = 0; d < n; d += lanes) {
                const int part = std::min(lanes, n - d);
                simd::store(narrow + d, simd::load(row[r] + d, part), part);
            }
            for (int d = 0; d < n; d += 2) to[d / 2 * R + r] = narrow[d].bits | uint32_t(narrow[d + 1].bits) << 16;
        }
    }

    static simd::U candidates(const uint32_t* at) {
        simd::U pair;
        std::memcpy(&pair, at, sizeof pair);
        return pair;
    }
#if defined(__AVX512BF16__)
    // Never run where this was written (no such processor): `pairs_bf16_error` guards it on every machine.
    static F multiply_add(const uint32_t* chosen, simd::U candidates, F sum) {
        return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(*chosen)), (__m512bh)candidates);
    }
#else
    static F multiply_add(const uint32_t* chosen, simd::U candidates, F sum) {  // slower than fp32: for tests
        const simd::U one = simd::U{} + *chosen;
        sum = simd::fma((F)(one << 16), (F)(candidates << 16), sum);
        return simd::fma((F)(one & 0xffff0000u), (F)(candidates & 0xffff0000u), sum);
    }
#endif
};

// Rows `row[0..n)` as one panel of R columns, zeros beyond n.
template <class Product, int R>
void pack_panel(const Rows& rows, const int64_t* row, int n, typename Product::Element* to) {
    alignas(64) float strip[R][STRIP] = {};
    const float* from[R];
    for (int r = 0; r < R; ++r) from[r] = strip[r];
    for (int64_t d = 0; d < rows.width; d += STRIP) {
        const int part = int(std::min<int64_t>(STRIP, rows.width - d));
        for (int r = 0; r < n; ++r) {
            if (rows.stored == as_fp32)
                from[r] = static_cast<const float*>(rows.data) + row[r] * rows.stride + d;
            else
                widen_row(rows, row[r] * rows.stride + d, strip[r], part);
        }
        Product::template pack<R>(from, part, to + Product::steps(d) * R);
    }
}

struct Tile { F at[ROWS][2]; };

// A function of its own, for compilers spill the sums where the loss is inlined behind the loop: half the speed.
template <class Product>
[[gnu::noinline]] void multiply(const typename Product::Element* chosen, const typename Product::Element* candidates,
                                int64_t steps, Tile& out) {
    Tile sum = {};
    for (int64_t step = 0; step < steps; ++step, chosen += ROWS, candidates += WIDTH) {
        const auto left = Product::candidates(candidates), right = Product::candidates(candidates + lanes);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            sum.at[r][0] = Product::multiply_add(chosen + r, left, sum.at[r][0]);
            sum.at[r][1] = Product::multiply_add(chosen + r, right, sum.at[r][1]);
        }
    }
    out = sum;
}

// ---- what becomes of a tile: the numbers of one panel of candidates, for one direction ----

struct Sigmoid {
    F linear[2], excess[2];
    double sum[WIDTH];

    static double* state_of(double* state, int64_t row, int, int) { return state + row; }  // shared by all directions

    void start(int, const double*) { *this = {}; }

    void add(const Tile& tile, int rows, F scale, F bias) {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            if (r >= rows) break;
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const F x = simd::fma(tile.at[r][half], scale, bias), e = simd::exp_negative(-simd::abs(x));
                linear[half] += simd::max(F{}, x);
                excess[half] = simd::fma(excess[half], 1.0f + e, e);
            }
        }
    }

    void flush() {
        for (int half = 0; half < 2; ++half) {
            const F logarithm = simd::log1p(excess[half]);
            for (int i = 0; i < lanes; ++i) sum[half * lanes + i] += double(linear[half][i]) + double(logarithm[i]);
            linear[half] = excess[half] = F{};
        }
    }

    void finish(int lane, double weight, double* state) const { *state += weight * sum[lane]; }

    static double given(const double* state, const Direction*, int) { return *state; }
};

struct Softmax {
    F largest[2], flushed[2], part[2];  // `sum` is relative to `flushed`, `part` to `largest`
    double sum[WIDTH];

    static double* state_of(double* state, int64_t row, int direction, int directions) {
        return state + 2 * (row * directions + direction);  // (largest, sum)
    }

    void start(int lane, const double* state) {
        if (lane == 0) {
            *this = {};
            largest[0] = largest[1] = simd::splat(-HUGE_VALF);
        }
        largest[lane / lanes][lane % lanes] = float(state[0]);
        sum[lane] = state[1];
        flushed[0] = largest[0];
        flushed[1] = largest[1];
    }

    void add(const Tile& tile, int rows, F scale, F) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            F top = largest[half];
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r)
                if (r < rows) top = simd::max(top, tile.at[r][half] * scale);
            F total = part[half] * simd::exp_negative(largest[half] - top);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r)
                if (r < rows) total += simd::exp_negative(tile.at[r][half] * scale - top);
            largest[half] = top;
            part[half] = total;
        }
    }

    void flush() {
        for (int half = 0; half < 2; ++half) {
            const F shrink = simd::exp_negative(flushed[half] - largest[half]);
            for (int i = 0; i < lanes; ++i) {
                double& own = sum[half * lanes + i];
                own = own * double(shrink[i]) + double(part[half][i]);
            }
            flushed[half] = largest[half];
            part[half] = F{};
        }
    }

    void finish(int lane, double, double* state) const {
        state[0] = double(largest[lane / lanes][lane % lanes]);
        state[1] = sum[lane];
    }

    static double given(const double* state, const Direction* direction, int directions) {
        double total = 0;
        for (int d = 0; d < directions; ++d)
            total += direction[d].weight * 0.5 * (state[2 * d] + std::log(state[2 * d + 1]));
        return total;
    }
};

// From the third-level cache to the second while a tile is worked on: 5 % of the whole at D = 512, measured.
inline void prefetch(const char* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
}

template <class Product, class Loss>
void stream(const Direction& one, int64_t c, const typename Product::Element* candidates, int panels, Loss* loss) {
    const int64_t steps = Product::steps(one.candidates.width);
    const F scale = simd::splat(one.scale), bias = simd::splat(one.bias);
    const auto* chosen = static_cast<const typename Product::Element*>(one.chosen);
    Tile tile;
    const int64_t ahead = steps * ROWS * 4 / panels;  // bytes of the next panel of chosen, fetched by each tile of this
    for (int64_t k = 0; k < c; k += ROWS, chosen += steps * ROWS) {
        const int rows = int(std::min<int64_t>(ROWS, c - k));
        const bool last = (k + ROWS) % GROUP == 0 || k + ROWS >= c;
        for (int p = 0; p < panels; ++p) {
            if (k + ROWS < c) prefetch(reinterpret_cast<const char*>(chosen + steps * ROWS) + p * ahead, ahead);
            multiply<Product>(chosen, candidates + p * steps * WIDTH, steps, tile);
            loss[p].add(tile, rows, scale, bias);
            if (last) loss[p].flush();
        }
    }
}

template <class Product, class Loss>
void add(const Direction* direction, int directions, int64_t c, const int64_t* row, int64_t n, double* state,
         const double* own, double* score) {
    using Element = typename Product::Element;
    const auto elements = [&](int d) { return Product::steps(direction[d].candidates.width) * WIDTH; };  // of a panel
    int64_t panel = 0;
    for (int d = 0; d < directions; ++d) panel = std::max(panel, elements(d));
    const int64_t fit = BLOCK_BYTES / std::max<int64_t>(1, panel * int64_t(sizeof(Element)));
    const int64_t most = std::max<int64_t>(1, std::min(fit, (n + WIDTH - 1) / WIDTH));
    const auto packed = aligned<Element>(most * panel);
    std::vector<Loss> loss(static_cast<size_t>(most));
    for (int64_t start = 0; start < n; start += most * WIDTH) {
        const int count = int(std::min(most * WIDTH, n - start)), panels = (count + WIDTH - 1) / WIDTH;
        for (int d = 0; d < directions; ++d) {
            const auto mine = [&](int i) { return Loss::state_of(state, row[start + i], d, directions); };
            for (int p = 0; p < panels; ++p)
                pack_panel<Product, WIDTH>(direction[d].candidates, row + start + p * WIDTH,
                                           std::min(WIDTH, count - p * WIDTH), packed.get() + p * elements(d));
            for (int i = 0; i < count; ++i) loss[i / WIDTH].start(i % WIDTH, mine(i));
            stream<Product>(direction[d], c, packed.get(), panels, loss.data());
            for (int i = 0; i < count; ++i) loss[i / WIDTH].finish(i % WIDTH, direction[d].weight, mine(i));
        }
        for (int64_t i = start; i < start + count; ++i)
            score[row[i]] =
                own[row[i]] + Loss::given(Loss::state_of(state, row[i], 0, directions), direction, directions);
    }
}

template <class Product>
void pack_chosen(const Rows& rows, const int64_t* chosen, int64_t c, void* to) {
    auto* panel = static_cast<typename Product::Element*>(to);
    for (int64_t k = 0; k < c; k += ROWS, panel += Product::steps(rows.width) * ROWS)
        pack_panel<Product, ROWS>(rows, chosen + k, int(std::min<int64_t>(ROWS, c - k)), panel);
}

bool inside(const int64_t* row, int64_t n, int64_t count) {
    return std::all_of(row, row + n, [count](int64_t at) { return 0 <= at && at < count; });
}

// The largest difference of a tile by bf16 products from the same by fp32 ones, on numbers that bf16 holds exactly.
float bf16_error() {
    constexpr int width = 67, most = std::max(ROWS, WIDTH);
    float number[most * width];
    uint32_t random = 1;
    for (float& one : number) {
        random = random * 1664525u + 1013904223u;
        one = (float(random >> 24) - 128.0f) / 128.0f;  // 8 bits: exact, as are their products
    }
    int64_t row[most];
    for (int i = 0; i < most; ++i) row[i] = i;
    const Rows rows = {number, most, width, width, as_fp32};
    alignas(64) float chosen[ROWS * width], candidates[WIDTH * width];
    alignas(64) uint32_t chosen_pairs[ROWS * (width + 1) / 2], candidate_pairs[WIDTH * (width + 1) / 2];
    pack_panel<Fp32, ROWS>(rows, row, ROWS, chosen);
    pack_panel<Fp32, WIDTH>(rows, row, WIDTH, candidates);
    pack_panel<Bf16, ROWS>(rows, row, ROWS, chosen_pairs);
    pack_panel<Bf16, WIDTH>(rows, row, WIDTH, candidate_pairs);
    Tile one, other;
    multiply<Fp32>(chosen, candidates, Fp32::steps(width), one);
    multiply<Bf16>(chosen_pairs, candidate_pairs, Bf16::steps(width), other);
    float worst = 0;
    for (int r = 0; r < ROWS; ++r)
        for (int half = 0; half < 2; ++half) {
            const float error = simd::largest(simd::abs(one.at[r][half] - other.at[r][half]));
            if (!(error <= worst)) worst = error;
        }
    return worst;
}

}  // namespace

extern "C" {

// 1 if the processor this was compiled for multiplies bf16 itself.
int pairs_multiplies_bf16() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

float pairs_bf16_error() { return bf16_error(); }

// Bytes of the panels of c chosen rows.
int64_t pairs_chosen_bytes(int64_t c, int64_t width, int bf16) {
    return (c + ROWS - 1) / ROWS * ROWS * 4 * (bf16 ? Bf16::steps(width) : Fp32::steps(width));
}

int pairs_pack_chosen(const Rows* rows, int bf16, const int64_t* chosen, int64_t c, void* to) {
    if (!inside(chosen, c, rows->count)) return out_of_range;
    bf16 ? pack_chosen<Bf16>(*rows, chosen, c, to) : pack_chosen<Fp32>(*rows, chosen, c, to);
    return ok;
}

// Adds c packed chosen rows to the candidates row[0..n) and writes their scores. `state` is [B] for sigmoid, else
// [B, directions, 2]; `own` and `score` are [B].
int pairs_add(const Direction* direction, int directions, int softmax, int bf16, int64_t c, const int64_t* row,
              int64_t n, double* state, const double* own, double* score) {
    for (int d = 0; d < directions; ++d)
        if (!inside(row, n, direction[d].candidates.count)) return out_of_range;
    const auto work = softmax ? (bf16 ? add<Bf16, Softmax> : add<Fp32, Softmax>)
                              : (bf16 ? add<Bf16, Sigmoid> : add<Fp32, Sigmoid>);
    try {
        work(direction, directions, c, row, n, state, own, score);
    } catch (const std::bad_alloc&) {
        return no_memory;
    }
    return ok;
}
}
