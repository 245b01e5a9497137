/* scan.c - from a key to a slot, without an index.
 *
 * Reading each record once is enough.  A key is never two domains' at once, and what commits that a
 * domain has it, or has it no more, is one store.  So if the key was somebody's at every moment of
 * the scan, it was one slot's all the time: whoever hands it on, by a rename or a remove and an
 * insert, leaves a moment when it is nobody's.  That slot was read as it was at some moment, and
 * found.  So a miss tells of a moment when the key was nobody's; a slot that is counted only later
 * was nobody's when the scan began.
 */
#include "scan.h"

static bool has_key(const sd_view *view, const sd_key *key)
{
    switch (key->what) {
    case SD_UUID_INDEX: return view->uuid[0] == key->uuid[0] && view->uuid[1] == key->uuid[1];
    case SD_NAME_INDEX: return !memcmp(view->name, key->name, key->name[0] + 1u);
    default: return view->values.id == key->id;
    }
}

#define SCAN_TRIES 1000

int sd_scan(const sd_segment *segment, const sd_key *key, uint32_t *slot)
{
    uint32_t slots;
    bool damaged = false;
    if (sd_slots(segment, &slots) != SD_OK) return SD_CORRUPT;
    for (*slot = 0; *slot < slots; ++*slot) {
        sd_view view;
        int result = SD_DOUBT;
        for (int i = 0; i < SCAN_TRIES && result == SD_DOUBT; i++)
            result = sd_view_begin(segment, *slot, &view);
        if (result == SD_DOUBT) return SD_DOUBT;
        if (result == SD_MISS) continue;
        if (result == SD_OK && has_key(&view, key)) return SD_OK;
        damaged |= result == SD_CORRUPT || !view.name[0];
    }
    return damaged ? SD_CORRUPT : SD_MISS;
}
