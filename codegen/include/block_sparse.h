// Block-sparse implicit GEMM, channels last, sums in fp32: the register tile.
//
//   out[p][o] = bias[o] + sum over kept tiles (tap, channels c) of x[p + tap][c] * w[c][o]
#ifndef BLOCK_SPARSE_H
#define BLOCK_SPARSE_H

namespace block_sparse {

// Has three vector registers free at one point of a loop: those that weights and inputs need. Else GCC may hold
// pointers there throughout, and in turn load weights from the stack for every product.
BLOCK_SPARSE_INLINE void free_registers() {
#if defined(__GNUC__) && (defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2))
  __m128 first, second, third;
  asm volatile("" : "=v"(first), "=v"(second), "=v"(third));
#endif
}

// Weights stream through the caches, and hardware prefetchers stop at every page: asked for so many bytes ahead.
constexpr int WEIGHTS_AHEAD = 8192;

BLOCK_SPARSE_INLINE void prefetch_weights(const void* p) {
  __builtin_prefetch(static_cast<const char*>(p) + WEIGHTS_AHEAD);
}

// Lines of the output are asked for so many bytes before they are stored to: stores that miss the cache wait for
// each other. More would push others out of L1.
constexpr int64_t OUTPUT_AHEAD = 6144;

// So many columns of tiles of PIXELS by WIDTH, in whole tiles.
template <int64_t PIXELS, int64_t WIDTH, class T>
constexpr int64_t columns_ahead() {
  constexpr int64_t TILE = PIXELS * WIDTH * sizeof(T);
  return (OUTPUT_AHEAD + TILE - 1) / TILE * WIDTH;
}

// ROWS by WIDTH elements, from `column` on. Tiles that share lines ask for them once.
template <int ROWS, int WIDTH, class T>
BLOCK_SPARSE_INLINE void prefetch_output(const T* out, int64_t column, int64_t stride) {
  constexpr int LINE = 64 / sizeof(T);
  if (WIDTH < LINE && column % LINE >= WIDTH) return;
#pragma GCC unroll 64
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < WIDTH; j += LINE) __builtin_prefetch(out + i * stride + column + j, 1);
  }
}

// A register tile: SEGMENTS x SEGMENT pixels, STEP elements apart in the input, by VECTORS vectors of channels.
//
// The bias comes last, since a large one would round every product that is added to it, or, for the short sums
// where an addition per output would show, first.
template <class Element, int LANES, int SPLIT, int VECTORS, int SEGMENTS, int SEGMENT, int64_t STEP, int BW, int BH, int FLUSH,
          bool BIAS_FIRST>
struct Tile {
  using Vec = Operands<Element, LANES, SPLIT>;
  using Value = typename Vec::Value;
  using Outputs = typename Vec::Outputs;
  using Weight = typename Vec::Weight;
  using Row = typename Vec::Row;
  static constexpr int CHANNELS = LANES / SPLIT;  // of one vector
  static constexpr int PIXELS = SEGMENTS * SEGMENT;
  static constexpr int DEPTH = Vec::DEPTH;
  static constexpr int WEIGHTS = LANES * DEPTH / SPLIT;  // in one vector
  static_assert(BW % DEPTH == 0 && (SPLIT == 1 || (BH == CHANNELS && !BIAS_FIRST)));
  typedef Value Accumulators[PIXELS][VECTORS];

  BLOCK_SPARSE_INLINE Value weights(const Weight* p) {
    if (PIXELS > 1) prefetch_weights(p);  // a lone pixel leaves enough time for loads to run ahead
    return Vec::weights(p);
  }

  // acc += x * w for one kept tile. SKIP names the pixel of each segment that is outside the image.
  template <int SKIP>
  BLOCK_SPARSE_INLINE void multiply(Accumulators& acc, const Element* const (&x)[SEGMENTS], const Weight* w) {
#pragma GCC unroll 1
    for (int k = 0; k < BW; k += DEPTH) {
      free_registers();
      Value wk[VECTORS];
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) wk[j] = weights(w + k * BH + j * WEIGHTS);
#pragma GCC unroll 64
      for (int p = 0; p < PIXELS; ++p) {
        const int i = p % SEGMENT;
        if ((SKIP == LEFT && i == 0) || (SKIP == RIGHT && i == SEGMENT - 1)) continue;
        const Value xp = Vec::inputs(x[p / SEGMENT] + i * STEP + k);
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) acc[p][j] = Vec::multiply_add(xp, wk[j], acc[p][j]);
      }
    }
  }

  // The same with any set of pixels outside the image: those read zeros.
  BLOCK_SPARSE_INLINE void multiply_any(Accumulators& acc, const Element* const (&x)[PIXELS], const Weight* w) {
#pragma GCC unroll 1
    for (int k = 0; k < BW; k += DEPTH) {
      free_registers();
      Value wk[VECTORS];
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) wk[j] = weights(w + k * BH + j * WEIGHTS);
#pragma GCC unroll 64
      for (int p = 0; p < PIXELS; ++p) {
        const Value xp = Vec::inputs(x[p] + k);
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) acc[p][j] = Vec::multiply_add(xp, wk[j], acc[p][j]);
      }
    }
  }

  // All kept tiles [begin, end) of one tap. A segment with mask 0 lies outside the image: x points at zeros.
  template <int SKIP>
  BLOCK_SPARSE_INLINE void multiply_tap(
      Accumulators& acc, const Element* const (&x)[SEGMENTS], const int64_t (&mask)[SEGMENTS], const Row& row,
      int32_t begin, int32_t end) {
#pragma GCC unroll 1
    for (int32_t b = begin; b < end; ++b) {
      const Element* xb[SEGMENTS];
#pragma GCC unroll 32
      for (int s = 0; s < SEGMENTS; ++s) xb[s] = x[s] + (row.channel_offset[b] & mask[s]);
      multiply<SKIP>(acc, xb, row.values + static_cast<int64_t>(b) * (BW * BH));
    }
  }

  // The same where only pixels [first, last) of each segment are inside the image.
  BLOCK_SPARSE_INLINE void multiply_border_tap(
      Accumulators& acc, const Element* const (&x)[SEGMENTS], const int64_t (&mask)[SEGMENTS], int64_t first,
      int64_t last, const Element* zeros, const Row& row, int32_t begin, int32_t end) {
#pragma GCC unroll 1
    for (int32_t b = begin; b < end; ++b) {
      const Element* xb[PIXELS];
#pragma GCC unroll 64
      for (int p = 0; p < PIXELS; ++p) {
        const int s = p / SEGMENT, i = p % SEGMENT;
        const bool inside = mask[s] && i >= first && i < last;
        xb[p] = inside ? x[s] + i * STEP + row.channel_offset[b] : zeros;
      }
      multiply_any(acc, xb, row.values + static_cast<int64_t>(b) * (BW * BH));
    }
  }

  BLOCK_SPARSE_INLINE void clear(Accumulators& acc) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
#pragma GCC unroll 64
      for (int p = 0; p < PIXELS; ++p) acc[p][j] = Value{};
    }
  }

  BLOCK_SPARSE_INLINE void start(Accumulators& acc, const Row& row) {
    clear(acc);
    if constexpr (BIAS_FIRST) {
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) {
        const Value b = Vec::first(row, j);
#pragma GCC unroll 64
        for (int p = 0; p < PIXELS; ++p) acc[p][j] = b;
      }
    }
  }

  // out[PIXELS][output channels]
  BLOCK_SPARSE_INLINE void finish(const Accumulators& acc, float* out, const Row& row) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
      const auto last = Vec::template last<BIAS_FIRST>(row, j);
#pragma GCC unroll 64
      for (int p = 0; p < PIXELS; ++p) Outputs::store(Vec::finish(acc[p][j], last), out + (p * VECTORS + j) * CHANNELS);
    }
  }

  // Sums in parts: every FLUSH tiles the accumulators move to memory and start anew, because many short sums
  // round less than a long one.
  struct PartialSums {
    alignas(64) float total[PIXELS * VECTORS * LANES];
    int32_t tiles = 0;  // in the accumulators
    bool flushed = false;
  };

  BLOCK_SPARSE_INLINE void save(const Accumulators& acc, PartialSums& sums) {
#pragma GCC unroll 64
    for (int p = 0; p < PIXELS; ++p) {
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) Vec::store(acc[p][j], sums.total + (p * VECTORS + j) * LANES);
    }
#if defined(__GNUC__)
    // Whose address is taken stays in memory: GCC holds few of them in registers, and then spills the weights.
    asm volatile("" : : "r"(sums.total) : "memory");
#endif
  }

  BLOCK_SPARSE_INLINE void add(Accumulators& acc, const PartialSums& sums) {
    if constexpr (FLUSH != 0) {
      if (!sums.flushed) return;
#pragma GCC unroll 64
      for (int p = 0; p < PIXELS; ++p) {
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) {
          acc[p][j] = acc[p][j] + Vec::load(sums.total + (p * VECTORS + j) * LANES);
        }
      }
    }
  }

  // The end of the part of tiles [begin, end) that fits the sum at hand; makes room if that is full.
  BLOCK_SPARSE_INLINE int32_t next_part(Accumulators& acc, PartialSums& sums, int32_t begin, int32_t end) {
    if constexpr (FLUSH == 0) {
      return end;
    } else {
      if (sums.tiles == FLUSH) {
        add(acc, sums);
        save(acc, sums);
        clear(acc);
        sums.flushed = true;
        sums.tiles = 0;
      }
      const int32_t stop = std::min(end, begin + FLUSH - sums.tiles);
      sums.tiles += stop - begin;
      return stop;
    }
  }

  // A tile of a linear layer, or of a 1x1 convolution that reads pixel after pixel.
  BLOCK_SPARSE_INLINE void linear(float* out, const Element* x, const Row& row) {
    Accumulators acc;
    PartialSums sums;
    start(acc, row);
    const int32_t end = row.row_ptr[1];
    for (int32_t begin = row.row_ptr[0], stop; begin < end; begin = stop) {
      stop = next_part(acc, sums, begin, end);
      multiply_tap<INSIDE>(acc, {x}, {-1}, row, begin, stop);
    }
    add(acc, sums);
    finish(acc, out, row);
  }

  // A tile of a convolution. `zeros`: BW of them, or (SEGMENT - 1) * STEP + BW for several segments, not PADDED.
  template <int KH, int KW, int BORDER>
  BLOCK_SPARSE_INLINE void conv(
      float* out, const Segment<Element> (&segment)[SEGMENTS], int64_t column, const Geometry& g, const Element* zeros,
      const Row& block_row) {
    Accumulators acc;
    PartialSums sums;
    start(acc, block_row);
#pragma GCC unroll 1
    for (int kh = 0; kh < KH; ++kh) {
      const Element* row[SEGMENTS];
      int64_t mask[SEGMENTS];
      bool any = false, all = true;
#pragma GCC unroll 32
      for (int s = 0; s < SEGMENTS; ++s) {
        const int64_t ih = segment[s].row * g.stride_h - g.pad_top + kh * g.dilation_h;
        const bool inside = ih >= 0 && ih < g.height;
        any |= inside;
        all &= inside;
        mask[s] = SEGMENTS == 1 && !(BORDER & PADDED) ? -1 : -static_cast<int64_t>(inside);
        row[s] = inside ? segment[s].image + ih * g.row_stride : zeros;
      }
      if (!any && !(BORDER & PADDED)) continue;
#pragma GCC unroll 1
      for (int kw = 0; kw < KW; ++kw) {
        int32_t begin = block_row.row_ptr[kh * KW + kw];
        const int32_t end = block_row.row_ptr[kh * KW + kw + 1];
        const int64_t iw = column * g.stride_w - g.pad_left + kw * g.dilation_w;
        const bool left = iw < 0, right = iw + (SEGMENT - 1) * g.stride_w >= g.width;
        const Element* x[SEGMENTS];
#pragma GCC unroll 32
        for (int s = 0; s < SEGMENTS; ++s) x[s] = row[s] + (iw * g.pixel_stride & mask[s]);
        for (int32_t stop; begin < end; begin = stop) {
          stop = next_part(acc, sums, begin, end);
          if (BORDER == INSIDE || !(left || right || (BORDER & PADDED && !all))) {
            multiply_tap<INSIDE>(acc, x, mask, block_row, begin, stop);
          } else if (BORDER & WIDE) {
            const int64_t first = left ? (-iw + g.stride_w - 1) / g.stride_w : 0;
            const int64_t last = (g.width - iw + g.stride_w - 1) / g.stride_w;
            if (BORDER & PADDED || (first < last && first < SEGMENT))
              multiply_border_tap(acc, x, mask, first, last, zeros, block_row, begin, stop);
          } else if (SEGMENT > 1) {
            if ((BORDER & LEFT) && left) multiply_tap<LEFT>(acc, x, mask, block_row, begin, stop);
            if ((BORDER & RIGHT) && right) multiply_tap<RIGHT>(acc, x, mask, block_row, begin, stop);
          }
        }
      }
    }
    add(acc, sums);
    finish(acc, out, block_row);
  }
};

}  // namespace block_sparse
#endif
