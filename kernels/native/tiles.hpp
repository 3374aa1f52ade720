// Small matrix products whose rows lie anywhere: register tiles, and what becomes of a result is a functor.
//
//     out[i][n] = sum_k a_i[k * step] b[k][n]
//
// The rows a_i are pointers, so tokens are gathered by reading them where they lie; a finished vector goes to
// put(i, n, vector, count), so tokens are scattered without a copy too. `product` packs b panel by panel (many rows);
// `product_in_place` reads b where it lies (few rows, which would not repay the packing).
//
// Every sum runs over k upwards in one chain of fused multiply-adds, whatever the tile, the panel and the number of
// threads: the bits of an element depend on its inputs alone.
//
// Cost: a step of a tile loads ROWS + 2 registers for 2 ROWS multiply-adds, 0.67 loads each with AVX2.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "native/vector_math.hpp"

#define TILES_INLINE inline __attribute__((always_inline))
#define TILES_LAMBDA __attribute__((always_inline))
#define TILES_ALONE __attribute__((noinline))  // a tile's sums need every register, so nothing else may live around them

namespace tiles {

using simd::bf16;
using simd::F;
using simd::lanes;

// ROWS x 2 sums, two vectors of b and one of a fit the registers: 16 with AVX2, 32 elsewhere.
#if defined(__AVX512F__)
constexpr int ROWS = 14;
#elif defined(__AVX2__)
constexpr int ROWS = 6;
#else
constexpr int ROWS = 8;
#endif
constexpr int SUMS = 2 * ROWS, PANEL = 2 * lanes;
constexpr int64_t DEPTH = 256;           // a panel of that many rows stays in the first-level cache
constexpr int64_t IN_CACHE = 512 << 10;  // bytes that stay in the second-level cache beside other things

TILES_INLINE float widen(float value) { return value; }
TILES_INLINE float widen(bf16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

TILES_INLINE void put_one(float* at, float value) { *at = value; }
TILES_INLINE void put_one(bf16* at, float value) { simd::store(at, simd::splat(value), 1); }

template <class S>
TILES_INLINE F load_some(const S* at, int count) {
    return count == lanes ? simd::load(at) : simd::load(at, count);
}

template <class S>
TILES_INLINE void store_some(S* at, F value, int count) {
    if (count == lanes)
        simd::store(at, value);
    else
        simd::store(at, value, count);
}

// Calls work(at, count) for the vectors of 0..size.
template <class Work>
TILES_INLINE void each_vector(int64_t size, Work work) {
    int64_t at = 0;
    for (; at + lanes <= size; at += lanes) work(at, lanes);
    if (at < size) work(at, int(size - at));
}

// <a, b> in four chains of vectors.
template <class A, class B>
TILES_INLINE float dot(const A* a, const B* b, int64_t size) {
    F sum[4] = {};
    int64_t k = 0;
    for (; k + 4 * lanes <= size; k += 4 * lanes)
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c)
            sum[c] = simd::fma(simd::load(a + k + c * lanes), simd::load(b + k + c * lanes), sum[c]);
    each_vector(size - k, [&](int64_t at, int count) TILES_LAMBDA {
        sum[0] = simd::fma(load_some(a + k + at, count), load_some(b + k + at, count), sum[0]);
    });
    return simd::sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Calls work(integral_constant<count>) for a count of 1..MOST that is known only at run time.
template <int MOST, class Work>
TILES_INLINE void constant(int count, Work work) {
    if constexpr (MOST > 1)
        if (count < MOST) return constant<MOST - 1>(count, work);
    work(std::integral_constant<int, MOST>{});
}

// K steps of a tile of R rows and V vectors; rows of b are `stride` apart, `a` is offset by `at` elements.
template <int R, int V, class B>
TILES_INLINE void steps(F (&sum)[R][V], const float* const (&a)[R], ptrdiff_t& at, ptrdiff_t step, const B* b,
                        ptrdiff_t stride, int64_t K) {
    for (int64_t k = 0; k < K; ++k, at += step, b += stride) {
        F wide[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) wide[v] = simd::load(b + v * lanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const F one = simd::splat(a[r][at]);
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) sum[r][v] = simd::fma(one, wide[v], sum[r][v]);
        }
    }
}

template <int R>
struct RowsOf {
    const float* at[R];
    TILES_INLINE RowsOf(const float* const* rows, ptrdiff_t offset) {
        for (int r = 0; r < R; ++r) at[r] = rows[r] + offset;
    }
};

// A tile over a packed panel: goes on from `sums`, rows of PANEL, and leaves them there.
template <int R>
TILES_ALONE void packed_tile(const float* const* rows, ptrdiff_t offset, ptrdiff_t step, const float* panel, int64_t K,
                             float* sums) {
    F sum[R][2];
    const RowsOf<R> a(rows, offset);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        sum[r][0] = simd::load(sums + r * PANEL);
        sum[r][1] = simd::load(sums + r * PANEL + lanes);
    }
    ptrdiff_t at = 0;
    steps<R, 2>(sum, a.at, at, step, panel, PANEL, K);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        simd::store(sums + r * PANEL, sum[r][0]);
        simd::store(sums + r * PANEL + lanes, sum[r][1]);
    }
}

// Hands on the sums of a tile, `count` rows of `stride`, of which the first `width` columns count.
template <class Put>
TILES_INLINE void put_tile(const float* sums, int64_t m, int64_t count, int64_t stride, int64_t n0, int64_t width, Put put) {
    for (int64_t r = 0; r < count; ++r, sums += stride)
        each_vector(width, [&](int64_t n, int size) TILES_LAMBDA { put(m + r, n0 + n, simd::load(sums + n), size); });
}

// ---- where b comes from: `pack` writes rows k0.. and columns n0.. of it as [depth][PANEL], with zeros to the right ----

template <class S>
struct Plain {  // b[k][n]
    const S* b;
    ptrdiff_t stride;
    TILES_INLINE const S* row(int64_t k) const { return b + k * stride; }
};

template <class S>
struct Gathered {  // b[at[k]][n]
    const S* b;
    ptrdiff_t stride;
    const int32_t* at;
    TILES_INLINE const S* row(int64_t k) const { return b + at[k] * stride; }
};

template <class S>
struct Turned {  // b[n][k]
    const S* b;
    ptrdiff_t stride;
};

template <class Source>
inline void pack(const Source& source, float* panel, int64_t k0, int64_t depth, int64_t n0, int width) {
    const int first = std::min(width, lanes), second = width - first;
    for (int64_t k = 0; k < depth; ++k, panel += PANEL) {
        const auto* from = source.row(k0 + k) + n0;
        simd::store(panel, load_some(from, first));
        simd::store(panel + lanes, second ? load_some(from + lanes, second) : F{});
    }
}

// Swaps the blocks of `size` lanes of a and b that lie off the diagonal.
template <int size, size_t... lane>
TILES_INLINE void swap_blocks(F& a, F& b, std::index_sequence<lane...>) {
    const F low = __builtin_shufflevector(a, b, (lane & size ? lanes + int(lane) - size : int(lane))...);
    b = __builtin_shufflevector(a, b, (lane & size ? lanes + int(lane) : int(lane) + size)...);
    a = low;
}

template <int size>
TILES_INLINE void transpose(F (&rows)[lanes]) {  // of lanes x lanes
    if constexpr (size < lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i)
            if (!(i & size)) swap_blocks<size>(rows[i], rows[i + size], std::make_index_sequence<lanes>{});
        transpose<2 * size>(rows);
    }
}

template <class S>
inline void pack(const Turned<S>& source, float* panel, int64_t k0, int64_t depth, int64_t n0, int width) {
    for (int part = 0; part < PANEL; part += lanes)
        each_vector(depth, [&](int64_t k, int count) TILES_LAMBDA {
            F block[lanes];
#pragma GCC unroll 16
            for (int n = 0; n < lanes; ++n)
                block[n] = part + n < width ? load_some(source.b + (n0 + part + n) * source.stride + k0 + k, count) : F{};
            transpose<1>(block);
            for (int i = 0; i < count; ++i) simd::store(panel + (k + i) * PANEL + part, block[i]);
        });
}

// Floats of scratch for a packed product of M rows: the panel, and the sums between blocks of K.
inline int64_t product_scratch(int64_t M) { return DEPTH * PANEL + (M + ROWS) * PANEL; }

template <class Source, class Put>
inline void product(int64_t M, int64_t K, int64_t N, const float* const* rows, ptrdiff_t step, const Source& source,
                    float* scratch, Put put) {
    float *panel = scratch, *sums = scratch + DEPTH * PANEL;
    for (int64_t n0 = 0; n0 < N; n0 += PANEL) {
        const int width = int(std::min<int64_t>(PANEL, N - n0));
        std::fill(sums, sums + M * PANEL, 0.0f);
        for (int64_t k0 = 0, depth; k0 == 0 || k0 < K; k0 += depth) {
            depth = std::min<int64_t>(DEPTH, K - k0);
            pack(source, panel, k0, depth, n0, width);
            const bool last = k0 + depth >= K;
            for (int64_t m = 0; m < M; m += ROWS) {
                const int64_t count = std::min<int64_t>(ROWS, M - m);
                float* sum = sums + m * PANEL;
                constant<ROWS>(int(count), [&](auto R) TILES_LAMBDA {
                    packed_tile<R.value>(rows + m, k0 * step, step, panel, depth, sum);
                });
                if (last) put_tile(sum, m, count, PANEL, n0, width, put);
            }
            if (depth == 0) break;
        }
    }
}

// Memory that is wanted next, brought into the second-level cache bit by bit while tiles are computed: read in columns,
// weights would come a cache line at a time.
struct Ahead {
    const char *at = nullptr, *end = nullptr;
    template <class S>
    static Ahead of(const S* from, int64_t size) {
        const char* at = reinterpret_cast<const char*>(from);
        return {at, at + size * int64_t(sizeof(S))};
    }
    TILES_INLINE void bring(int64_t bytes) {
        const char* until = std::min(end, at + bytes);
        for (; at < until; at += 64) __builtin_prefetch(at, 0, 2);
    }
};

// ---- few rows: b where it lies, contiguous [K, N] ----

// V vectors from column n0 on, into `out`, rows of V vectors. A vector may read past its row into the next ones, but
// not past the last.
template <int R, int V, class S>
TILES_ALONE void tile_in_place(int64_t K, int64_t N, int64_t n0, const float* const* rows, ptrdiff_t step, const S* b,
                               float* out) {
    F sum[R][V] = {};
    const RowsOf<R> a(rows, 0);
    const int64_t over = n0 + V * lanes - N;
    const int64_t safe = over > 0 ? std::max<int64_t>(0, K - (over + N - 1) / N) : K;
    ptrdiff_t at = 0;
    steps<R, V>(sum, a.at, at, step, b + n0, N, safe);
    for (int64_t k = safe; k < K; ++k) {
        float padded[V * lanes] = {};
        for (int64_t n = n0; n < std::min<int64_t>(N, n0 + V * lanes); ++n) padded[n - n0] = widen(b[k * N + n]);
        steps<R, V>(sum, a.at, at, step, padded, 0, 1);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) simd::store(out + (r * V + v) * lanes, sum[r][v]);
}

// One tile of the fewest vectors that reach `end`, or of the most there are registers for; returns its width.
template <int R, int V, class S>
TILES_INLINE int64_t widest_tile(int64_t K, int64_t N, int64_t n0, int64_t end, const float* const* rows,
                                 ptrdiff_t step, const S* b, float* out) {
    constexpr int less = V > 8 ? 8 : V > 6 ? 6 : V > 4 ? 4 : V - 1;
    if constexpr (V > 1)
        if (V * R > SUMS || end - n0 <= less * lanes) return widest_tile<R, less>(K, N, n0, end, rows, step, b, out);
    if constexpr (V * R <= SUMS) tile_in_place<R, V>(K, N, n0, rows, step, b, out);
    return V * lanes;
}

// Columns 0 to `end` of the N.
template <class S, class Put>
inline void product_in_place(int64_t M, int64_t K, int64_t N, int64_t end, const float* const* rows, ptrdiff_t step,
                             const S* b, Ahead ahead, Put put) {
    alignas(64) float sums[SUMS * lanes];
    const int64_t tiles = (M + ROWS - 1) / ROWS * ((end + PANEL - 1) / PANEL);
    const int64_t share = (ahead.end - ahead.at) / std::max<int64_t>(1, tiles) + 64;
    for (int64_t m = 0; m < M; m += ROWS) {
        const int64_t count = std::min<int64_t>(ROWS, M - m);
        for (int64_t n = 0, wide = 0; n < end; n += wide) {
            constant<ROWS>(int(count), [&](auto R) TILES_LAMBDA {
                wide = widest_tile<R.value, 12>(K, N, n, end, rows + m, step, b, sums);
            });
            ahead.bring(share * wide / PANEL);
            put_tile(sums, m, count, wide, n, std::min(wide, end - n), put);
        }
    }
}

// What repays packing: b too large to stay in the second-level cache while the rows pass over it, and several rows.
template <class S, class Put>
inline void product_of_either(int64_t M, int64_t K, int64_t N, int64_t end, const float* const* rows, ptrdiff_t step,
                              const S* b, Ahead ahead, float* scratch, Put put) {
    if (M <= 2 * ROWS || K * N * int64_t(sizeof(S)) <= IN_CACHE)
        product_in_place(M, K, N, end, rows, step, b, ahead, put);
    else
        product(M, K, end, rows, step, Plain<S>{b, N}, scratch, put);
}

// ---- one row, and rows of b that lie anywhere: put(n, sum over i of a[i] b_i[n], count) with b_i = row(i) ----

template <int V, class Row, class Put>
TILES_ALONE void gathered_tile(int64_t K, const float* a, Row row, int64_t n0, int count, Put put) {
    F sum[V] = {};
    for (int64_t i = 0; i < K; ++i) {
        const auto* b = row(i) + n0;
        const F one = simd::splat(a[i]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sum[v] = simd::fma(one, V == 1 ? load_some(b, count) : simd::load(b + v * lanes), sum[v]);
    }
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) put(n0 + v * lanes, sum[v], count);
}

template <class Row, class Put>
inline void gathered_sum(int64_t K, const float* a, Row row, int64_t begin, int64_t end, Put put) {
    int64_t n = begin;
    for (; n + 12 * lanes <= end; n += 12 * lanes) gathered_tile<12>(K, a, row, n, lanes, put);
    for (; n + 4 * lanes <= end; n += 4 * lanes) gathered_tile<4>(K, a, row, n, lanes, put);
    for (; n < end; n += lanes) gathered_tile<1>(K, a, row, n, int(std::min<int64_t>(lanes, end - n)), put);
}

}  // namespace tiles
