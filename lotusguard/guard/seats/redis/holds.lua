-- SPDX-License-Identifier: Apache-2.0
-- The holds of one room: where each is, and how an event moves it, as lotusguard/rules/room_holds.py does.
-- A hold has the fields of lotusguard.rules.seats.Hold; "place", which is higher the later it got where it is; and for a
-- pending one "lease": when it ends unless its guard renews it.

local ENDINGS = {leave = true, vanish = true, expire = true}
local RESERVED = {'issued', 'issued_expired', 'issued_unseated', 'reconnecting', 'left'}
local pending, sessions, reserved = fields('p'), fields('s'), fields('r')
local issued, sessions_of, times_to_arrive = fields('i'), fields('n'), fields('c')
local due = order(KEYS[2])          -- what time ends: holds, requests in flight, and users' times to arrive
local unconfirmed = order(KEYS[3])  -- holds that a listing has to confirm, by the time they ended
local seatless = order(KEYS[4])     -- holds without a seat, by their place
local ended = order(KEYS[5])        -- ended sessions, by the time they ended
local now                           -- the time of this step

local function key_of(alias, name) return alias .. '\0' .. name end

-- The identity of a token. One that cannot be read gets one of its own, so that it replaces no other hold.
local function identity_of(identity, hold_id) return identity ~= '' and identity or hold_id end

local function field_of(hold)
  if hold.state == 'pending' then return 'p' .. hold.id end
  if TABLE[hold.state].in_call then return 's' .. key_of(hold.alias, hold.sid) end
  return 'r' .. key_of(hold.alias, hold.identity)
end

local function by_place(a, b) return a.place < b.place end

local function in_order(holds)
  table.sort(holds, by_place)
  return holds
end

local function how_many(states)
  local number = 0
  for _, state in ipairs(states) do number = number + (room.states[state] or 0) end
  return number
end

local function taken_out(list, item)
  local left = {}
  for _, one in ipairs(list) do
    if one ~= item then left[#left + 1] = one end
  end
  return left
end

-- where holds are --------------------------------------------------------------------------------------------------

-- Whether a hold takes no seat because none was free, or nobody could tell.
local function is_seatless(hold) return hold.state == 'unseated' or hold.state == 'issued_unseated' end

-- Write a hold where it belongs. A session without a token is nowhere looked up by its ID.
local function put(hold)
  local name, rules = field_of(hold), TABLE[hold.state]
  room.place = room.place + 1
  hold.place = room.place
  write(name, hold)
  if hold.state == 'pending' then
    if hold.lease then due.put(name, hold.lease) end
    return
  end
  if hold.id ~= hold.sid then issued[hold.id] = name end
  if rules.moves.expire ~= nil then due.put(name, hold.expires) end
  if rules.unconfirmed then unconfirmed.put(name, hold.expires) end
  if is_seatless(hold) then seatless.put(name, hold.place) end
end

local function put_pending(hold)
  put(hold)
  count(hold, 1)
end

local function put_session(hold)
  put(hold)
  local key = key_of(hold.alias, hold.identity)
  local sids = sessions_of[key] or {}
  sids[#sids + 1] = hold.sid
  sessions_of[key] = sids
  add_to(room.in_call, hold.alias, 1)
  count(hold, 1)
end

-- What is reserved for a user, in the order in which it got there.
local function reserved_for(name)
  local holds = {}
  for place, key in ipairs(user_of(name).reserved) do holds[place] = reserved[key] end
  return holds
end

local move

local function put_reserved(key, hold)
  count(hold, 1)  -- first, so that the user is known throughout
  local older = reserved[key]
  if older then move(older, 'replace') end
  put(hold)
  if hold.state == 'issued_unseated' then room.owners = room.owners + 1 end
  local user = users[hold.user]
  user.reserved[#user.reserved + 1] = key
  users[hold.user] = user
  if #user.reserved > RESERVED_PER_USER then move(reserved[user.reserved[1]], 'replace') end
end

local function take_out(hold)
  local name, rules, key = field_of(hold), TABLE[hold.state], key_of(hold.alias, hold.identity)
  write(name, nil)
  if hold.state == 'pending' then
    due.drop(name)
    return
  end
  issued[hold.id] = nil
  if rules.moves.expire ~= nil then due.drop(name) end
  if rules.unconfirmed then unconfirmed.drop(name) end
  if is_seatless(hold) then seatless.drop(name) end
  if rules.in_call then
    local sids = taken_out(sessions_of[key], hold.sid)
    sessions_of[key] = #sids > 0 and sids or nil
    add_to(room.in_call, hold.alias, -1)
  else
    local user = users[hold.user]
    user.reserved = taken_out(user.reserved, key)
    users[hold.user] = user
  end
end

-- The one place where a hold that counts changes its state.
function move(hold, event)
  local rules, at = TABLE[hold.state], event == 'expire' and hold.expires or now
  local after = rules.moves[event]
  if after == nil then error('a hold that is ' .. hold.state .. ' cannot ' .. event) end
  take_out(hold)
  count(hold, -1)
  if ENDINGS[event] then room.vacated = math.max(room.vacated, at) end
  if after then
    hold.state = after
    local key = key_of(hold.alias, hold.identity)
    if TABLE[after].in_call then
      if event == 'arrive' then hold.began = at end
      put_session(hold)
    elseif not (rules.in_call and (reserved[key] or sessions_of[key])) then
      -- else the identity has a newer token or session, which keeps the seat
      if event == 'leave' or event == 'vanish' then
        hold.began = at
        hold.expires = event == 'leave' and at or at + RECONNECT_WINDOW
      end
      put_reserved(key, hold)
    end
  end
  forget(hold.user)
end

-- which holds there are --------------------------------------------------------------------------------------------

-- The hold of a request or a token.
local function hold_with(hold_id)
  local name = issued[hold_id]
  return pending[hold_id] or name and read(name)
end

local function sessions_with(alias, identity)
  local holds = {}
  for place, sid in ipairs(sessions_of[key_of(alias, identity)] or {}) do holds[place] = sessions[key_of(alias, sid)] end
  return holds
end

local function all_holds()
  local holds = {}
  for _, letter in ipairs({'p', 's', 'r'}) do
    for _, hold in ipairs(Store.all(letter)) do holds[#holds + 1] = hold end
  end
  return holds
end

-- Read many holds, and their users.
local function read_all(names)
  Store.fetch(names)
  local holds, of_users = {}, {}
  for i = 1, #names do
    local hold = read(names[i])
    holds[i], of_users[i] = hold, 'u' .. hold.user
  end
  Store.fetch(of_users)
  return holds
end

-- Those without a seat, by the letter of their fields: s in the call, r with a token.
local function without_seat(letter)
  local names = {}
  for _, found in ipairs(seatless.up_to()) do
    if found[1]:sub(1, 1) == letter then names[#names + 1] = found[1] end
  end
  return read_all(names)
end

-- Those that a listing has to confirm, if they ended by a time.
local function to_confirm(most)
  local names = {}
  for place, found in ipairs(unconfirmed.up_to(most)) do names[place] = found[1] end
  return read_all(names)
end
