"""Ten epochs of a new head on a frozen backbone: the textbook's program, and a head on cached features.

    python -m benchmarks.textbook            # about 4 minutes on two cores; rows go to results/textbook-DEVICE.csv
    python -m benchmarks.textbook --quick    # seconds, tiny models, no rows: that both programs run and agree

Both start from the same PNG files, with the same weights in memory, and end with a trained head. The textbook's
program passes every image through the backbone in every epoch. Ours passes it once, so that with the measured parts

    limit = epochs x forward / (forward + heads)

is the best it could do: forward is one pass over the images as the textbook's program makes it (decoding,
preprocessing, backbone), heads is our fitting of the head on cached features, all epochs of it. What lies between the
ratio and the limit is the cache's own cost: checking and hashing files, writing the shards.

Both use one process with torch's default threads, the same batch size, optimizer, rate and schedule, three channels
and the channels-last layout. Our preprocessing leaves images in that layout; a textbook would not, and its passes would
cost a third more with ResNet-50 (LOG.md), which is no merit of the cache.

A run of ours, into a fresh cache, comes after every second epoch of theirs, and is compared with the epochs before and
after it, so that other work on the machine falls on both. No ratio is given unless the programs agree: `Agreement`.
"""

import argparse
from dataclasses import replace

from benchmarks.rows import append_rows
from benchmarks.textbook.measure import Row, measure
from benchmarks.textbook.workload import QUICK, WORKLOADS


def _in_words(row: Row) -> str:
    return (
        f"{row['workload']}, {row['num_images']} images, {row['epochs']} epochs: textbook {row['textbook']} s, ours "
        f"{row['ours_p50']} s (median): {row['ratio_p50']} times faster (p20 {row['ratio_p20']}, p80 "
        f"{row['ratio_p80']}; by CPU seconds {row['ratio_of_cpu_seconds']}). The limit is {row['limit']}, this is "
        f"{row['fraction_of_limit']:.1%} of it.\n"
        f"  Held-out accuracy {row['accuracy_textbook']} and {row['accuracy_ours']}. The textbook's head on our "
        f"features {row['accuracy_replay']}, the same class for {row['replay_agreement']:.1%}. Features differ by "
        f"{row['feature_difference']:.2%}.\n"
        f"  Peak memory {row['textbook_peak_mib']:.0f} and {row['ours_peak_mib']:.0f} MiB. Load before: "
        f"{row['load_before']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and no rows: that both programs agree")
    parser.add_argument("--images", type=int, help="training images of ResNet-50 (80); the others get 12 times as many")
    options = parser.parse_args()
    rows = []
    for workload in (QUICK,) if options.quick else WORKLOADS:
        if options.images and not options.quick:
            share = options.images / WORKLOADS[0].num_train
            workload = replace(workload, num_train=round(workload.num_train * share))
        row = measure(workload, say=print)
        rows.append(row)
        print(_in_words(row), flush=True)
    if not options.quick:
        append_rows("textbook", rows)


if __name__ == "__main__":
    main()
