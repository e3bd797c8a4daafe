// What each thread works on, and its memory.
#ifndef BLOCK_SPARSE_THREADS_H
#define BLOCK_SPARSE_THREADS_H

namespace block_sparse {

// Memory of a thread, 64-byte aligned, that later calls find warm.
template <class Element>
inline Element* thread_memory(int64_t count) {
  struct Memory {
    void* data = nullptr;
    int64_t bytes = 0;
    ~Memory() { std::free(data); }
  };
  static thread_local Memory memory;
  const int64_t bytes = (count * sizeof(Element) + 63) / 64 * 64;
  if (memory.bytes < bytes) {
    std::free(memory.data);
    memory.data = std::aligned_alloc(64, bytes);
    memory.bytes = memory.data ? bytes : 0;
    if (!memory.data) throw std::bad_alloc();
  }
  return static_cast<Element*>(memory.data);
}

struct Range {
  int64_t begin, end;
};

// The share of n tiles of one of `parts` threads; empty for a thread beyond them.
BLOCK_SPARSE_INLINE Range share(int64_t n, int64_t part, int64_t parts) {
  return {n * std::min(part, parts) / parts, n * std::min(part + 1, parts) / parts};
}

// Block rows [begin, end) of one of `parts` threads, balanced by kept tiles; a row also costs its epilogue,
// `row_cost` halves of a tile. The ranges of all parts cover every row, empty ones too.
BLOCK_SPARSE_INLINE int64_t balanced_boundary(
    const int32_t* row_ptr, int64_t rows, int64_t taps, int64_t part, int64_t parts, int64_t row_cost) {
  const auto cost = [&](int64_t r) { return 2 * static_cast<int64_t>(row_ptr[r * taps]) + row_cost * r; };
  const int64_t target = cost(rows) * part;
  int64_t low = 0, high = part == parts ? 0 : rows;
  while (low < high) {
    const int64_t r = (low + high) / 2;
    if ((cost(r) + cost(r + 1)) * parts <= 2 * target) {
      low = r + 1;
    } else {
      high = r;
    }
  }
  return part == parts ? rows : low;
}

BLOCK_SPARSE_INLINE Range balanced_rows(
    const int32_t* row_ptr, int64_t rows, int64_t taps, int64_t part, int64_t parts, int64_t row_cost = 1) {
  return {balanced_boundary(row_ptr, rows, taps, part, parts, row_cost),
          balanced_boundary(row_ptr, rows, taps, part + 1, parts, row_cost)};
}

}  // namespace block_sparse
#endif
