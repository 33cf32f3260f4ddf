// Segments of a stacked weight (q,k,v; gate,up): which columns and ranks a column tile has, and the order of the tiles.
#pragma once

#include "dtype.h"

namespace mmpeft::cuda {

constexpr int kMaxSegments = 4;

struct Segment {
  int first_column, end_column;
  int first_tile, end_tile;
  int first_rank, num_ranks;
};

struct SegmentTable {
  int num_segments = 0;
  int num_tiles = 0;  // column tiles; none crosses a segment
  Segment segments[kMaxSegments] = {};
};

// Adds `num_out` columns with `num_ranks` ranks behind the segments that the table has; at most kMaxSegments of them.
inline void append_segment(SegmentTable& table, int num_out, int num_ranks, int block_n) {
  const Segment none = {};
  const Segment& last = table.num_segments > 0 ? table.segments[table.num_segments - 1] : none;
  const int first_rank = last.first_rank + last.num_ranks;
  const int end_tile = table.num_tiles + ceil_div(num_out, block_n);
  const Segment added = {last.end_column, last.end_column + num_out, table.num_tiles, end_tile, first_rank, num_ranks};
  table.segments[table.num_segments++] = added;
  table.num_tiles = end_tile;
}

// The segment of a column tile. 0 <= tile_n < num_tiles.
MMPEFT_HOST_DEVICE inline int segment_of_tile(const SegmentTable& table, int tile_n) {
  int index = 0;
  while (tile_n >= table.segments[index].end_tile) ++index;
  return index;
}

MMPEFT_HOST_DEVICE inline int first_column_of_tile(const Segment& segment, int tile_n, int block_n) {
  return segment.first_column + (tile_n - segment.first_tile) * block_n;
}

struct TilePosition {
  int tile_m, tile_n;
};

// Rows of tiles that run side by side and share their columns of W in L2.
constexpr int kGroupM = 8;

// Column by column within groups of kGroupM tile rows. Each position of the grid comes exactly once.
MMPEFT_HOST_DEVICE inline TilePosition grouped_tile(int tile_idx, int num_tiles_m, int num_tiles_n) {
  const int num_in_group = kGroupM * num_tiles_n;
  const int first_m = tile_idx / num_in_group * kGroupM;
  const int rows_left = num_tiles_m - first_m;
  const int group_rows = rows_left < kGroupM ? rows_left : kGroupM;
  const int in_group = tile_idx % num_in_group;
  return {first_m + in_group % group_rows, in_group / group_rows};
}

}  // namespace mmpeft::cuda
