// Where the pixels of a convolution lie.
#ifndef BLOCK_SPARSE_GEOMETRY_H
#define BLOCK_SPARSE_GEOMETRY_H

namespace block_sparse {

// What a convolution needs to know besides its strides along a row. Sizes in pixels, strides in elements.
struct Geometry {
  int64_t height, width;  // input
  int64_t row_stride, pixel_stride;
  int64_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
};

// A run of pixels of one output row. All segments of a tile start at the same column.
template <class Element>
struct Segment {
  const Element* image;
  int64_t row;
};

// How a tap can leave the image within one segment: by its first pixel, by its last, by any number of pixels.
// PADDED, besides WIDE: what lies outside is no zero, but whatever `zeros` holds, and counts.
enum Border { INSIDE = 0, LEFT = 1, RIGHT = 2, WIDE = 4, PADDED = 8 };

}  // namespace block_sparse
#endif
